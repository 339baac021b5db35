"""A URL where a command takes a path alone is refused: Python would make the folder `s3:` of it."""

from pathlib import Path
from typing import Any

import pytest
from typer import BadParameter
from typer.testing import CliRunner

import cache_spec.__main__
import train.__main__
from cache_spec.arguments import path
from completions.commands import commands

TAKE_URLS = {  # as docs/stores.md has them
    "cache_spec info": {"cache"},
    "cache_spec verify": {"cache"},
    "harvest": {"out"},
    "train": {"cache"},
    "evaluate": {"cache"},
    "evaluate features": {"cache"},
    "evaluate neuronpedia": {"cache"},
}
PLACES = {"cache", "out", "run", "runs", "folder", "scratch", "probe_data", "shifted_text"}
URL = "s3://me:hush@caches/runs"


@pytest.mark.parametrize("name", commands())
def test_every_path_of_a_command_refuses_a_url_but_those_that_take_one(name):
    described: dict[str, Any] = {found.name: found.type_descriptor for found in commands()[name].params}
    paths = {key for key, found in described.items() if "Path" in str(found.annotation)}
    assert paths == PLACES & set(described) - TAKE_URLS.get(name, set())
    assert {described[key].parameter_info.parser for key in paths} <= {path}, "typer takes anything for a path"


def test_a_folder_of_such_a_name_can_be_said():
    assert path("./s3:/x") == Path("./s3:/x")
    with pytest.raises(BadParameter, match="a path on this machine is wanted"):
        path(URL)


@pytest.mark.parametrize(
    ("app", "arguments"),
    [
        (train.__main__.app, ["--cache", "cache.zarr", "--out", URL]),
        (cache_spec.__main__.app, ["transcode", "cache.zarr", URL]),
    ],
    ids=["train", "transcode"],
)
def test_nothing_is_made_of_it(app, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert "it is a URL, and a path on this" in ended.output
    assert "hush" not in ended.output
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_stores_names_the_commands_that_take_a_url():
    said = (Path(__file__).parent.parent / "docs" / "stores.md").read_text().partition("\n|")[0]
    for name in TAKE_URLS:
        assert f"`{name.rpartition(' ')[2] if name.startswith('cache_spec') else name}" in said, name
