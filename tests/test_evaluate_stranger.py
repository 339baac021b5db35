"""Runs and SAEs from a stranger: what evaluate prints of them cannot move the cursor or turn the text around."""

import json

import pytest
from evaluate_fixtures import no_model, small_cache, small_sae, write_run

from cache_spec.progress import Progress
from evaluate.command import run
from evaluate.runs import RunsIncomplete
from train.exported import write_folder
from train.foreign import read_folder
from train.names import find

OWNED = "\x1b[2J\x1b]0;owned\x07\u202eevil\x9b1m\r"
UNSAFE = {"\x1b", "\x07", "\u202e", "\x9b", "\r"}


def test_no_name_that_a_stranger_chose_moves_the_cursor(tmp_path, monkeypatch, capsys):
    no_model(monkeypatch)
    cache, runs = small_cache(tmp_path / "cache"), tmp_path / "runs"
    for seed in range(2):
        for masked in (0.0, 0.5):
            facts = {"recipe": f"recipe {masked} {OWNED}\tof two\nlines", "name": f"name{OWNED}"}
            where = write_run(runs, cache, small_sae(seed + 10 * (masked > 0)), seed=seed, masked=masked)
            stated = json.loads((where / "run.json").read_text())
            config = stated["config"] | {"optimizer": f"setting {seed} {OWNED}"}
            del stated["crc32c"]
            (where / "run.json").write_text(json.dumps(stated | facts | {"config": config}))
    (runs / f"left out{OWNED}").mkdir()
    (runs / f"left out{OWNED}" / "run.json").write_text("{}")
    theirs = tmp_path / f"theirs{OWNED}"
    write_folder(theirs, find("formats", "saelens").write(read_folder(where), approximate=False, k=None).files)
    described = json.loads((theirs / "cfg.json").read_text())
    described["metadata"] |= {"training_architecture": f"theirs{OWNED}", "hook_name": f"blocks.1{OWNED}"}
    (theirs / "cfg.json").write_text(json.dumps(described))
    with pytest.raises(RunsIncomplete):
        run(runs, out=tmp_path / "out", metrics="core", saes=[str(theirs)], cache=cache.path, hook="layer_1")
    told, progress = capsys.readouterr()
    assert not UNSAFE & set(told + progress)
    for name in ("recipe 0.5 ", "setting 1 ", "left out", "theirs"):
        assert f"{name}\\x1b[2J" in told, name
    assert "\\x1b[2J" in progress
    assert "of two lines" in told, "a name has one line of the table"


def test_a_name_and_a_note_beside_the_progress_are_spelled_out(capsys):
    with Progress(f"evaluate {OWNED}", 1, "SAEs") as progress:
        progress.advance(note=OWNED)
    told = capsys.readouterr().err
    assert told.count("owned") == 2
    assert not UNSAFE & set(told)
