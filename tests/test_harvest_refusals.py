"""What cannot be harvested is refused before the model is measured or a file is written."""

import pytest
from harvest_fixtures import request_for, save_model, write_text

from cache_spec import CacheConflict, UserError, transcode
from harvest import run
from harvest.model import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


def test_an_archive_and_a_link_to_nothing_are_refused_at_once(model, text, tmp_path, capsys):
    out = tmp_path / "cache"
    run.harvest(model, request_for(model, text), out)
    transcode(out, tmp_path / "archive")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    capsys.readouterr()
    for name, fault in (
        ("archive", "is a compressed archive; .* transcode"),
        ("link", "is a link to .*nowhere, which"),
    ):
        with pytest.raises(CacheConflict, match=fault):
            run.harvest(model, request_for(model, text), tmp_path / name)
    assert not capsys.readouterr().out
    assert not (tmp_path / "nowhere").exists()


def test_text_that_is_not_there_is_told_before_anything_is_measured(model, tmp_path, capsys):
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"no text at nowhere\.txt"):
            run.harvest(model, request_for(model, "nowhere.txt"), tmp_path / "cache", dry_run=dry_run)
    assert not capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
