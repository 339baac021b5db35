"""docs/features.md: its commands parse, and its numbers are those of the code."""

import re
import shlex
from functools import partial
from pathlib import Path

from typer import Typer
from typer.main import get_command

from cache_spec.command import app_for
from evaluate.__main__ import OTHERS, app
from evaluate.features.collect import N_SAMPLE
from evaluate.features.gather import N_BANDS, PER_BAND, Asked
from evaluate.features.lens import N_NEAREST, N_TOKENS
from evaluate.features.selection import N_DEFAULT
from evaluate.neuronpedia.records import BATCH
from evaluate.neuronpedia.upload import KEY

PAGE = (Path(__file__).parent.parent / "docs" / "features.md").read_text()
WORDS = {3: "three", 5: "fifths", 8: "eight", 10: "ten"}


def test_its_commands_parse():
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "evaluate"]
        chosen = app_for(arguments := words[2:], app, OTHERS)
        assert isinstance(chosen, partial), line
        assert isinstance(chosen.func, Typer), line
        get_command(chosen.func).make_context(arguments[0], arguments[1:])


def test_its_numbers_are_those_of_the_code():
    text = PAGE.replace("\n", " ")
    for said in (
        f"of which there are {N_DEFAULT}",
        f"{N_SAMPLE} of its firings",
        f"in {WORDS[N_BANDS]} by value, with {WORDS[PER_BAND]} examples",
        f"the {WORDS[N_TOKENS]} tokens",
        f"The {WORDS[N_NEAREST]} latents",
        f"{BATCH} latents each",
        f"`{KEY}`",
    ):
        assert said in text, said
    assert "At most a million rows" in text
    assert Asked(run=Path()).tokens == 1_000_000
