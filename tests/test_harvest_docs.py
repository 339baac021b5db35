"""docs/harvest.md is true: its commands are ones that the command line takes, its names are those of the tables."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from harvest.__main__ import app
from harvest.hub_name import PRESETS
from harvest.locate import SHORT_NAMES

TEXT = (Path(__file__).parent.parent / "docs/harvest.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_line_takes_the_command(line):
    options = shlex.split(line.partition("-m harvest")[2])
    command = typer.main.get_command(app)
    context = command.make_context("harvest", options, resilient_parsing=False)
    assert context.params["out"] is not None


def test_every_option_that_is_named_exists():
    command = typer.main.get_command(app)
    known = {name for parameter in command.params for name in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) - {"--nproc-per-node", "--ntasks"} <= known


def test_the_short_names_and_presets_are_all_there():
    models = TEXT.split("## Models")[1].split("\n\n")[1]
    assert {name for name in SHORT_NAMES if f"`{name}`" in models} == set(SHORT_NAMES)
    texts = TEXT.split("## Text")[1].split("## Variants")[0]
    for name, hub in PRESETS.items():
        assert f"`{name}`" in texts
        assert hub.repo in texts
