"""docs/recipes.md is true: its commands parse, its sizes are right, and what it quotes is what is printed."""

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import DATA, run_config
from typer.main import get_command

from train.grid import Lists, make_runs
from train.options import Options
from train.passes import _SAVED_BYTES, _STATE_BYTES, n_parameters
from train.reading import read_lists, with_preset
from train.scale import Scale
from train.timetable import Schedule

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "recipes.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
COLUMN_BYTES = 20


def parsed(words: list[str]) -> dict[str, Any]:
    """The values of a command's options, as it would get them; typer raises for one that it does not have."""
    assert words[:2] == ["python", "-m"]
    app = import_module(f"{words[2]}.__main__").app
    return get_command(app).make_context(words[2], words[3:]).params


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_every_command_parses(words):
    assert parsed(words)


def options_of(words: list[str]) -> Options:
    values = parsed(words)
    preset = {"preset"} | {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    return with_preset(Options(**values), preset)[0]


def lists_of(words: list[str]) -> Lists:
    return read_lists(options_of(words))


TRAIN = [words for words in COMMANDS if words[2] == "train"]


@pytest.mark.parametrize("words", TRAIN, ids=lambda words: " ".join(words)[:80])
def test_every_train_command_makes_the_runs_it_names(words):
    schedule = Schedule(
        warmup_steps=1,
        decay_start=1,
        sparsity_warmup_steps=1,
        anneal_start=1,
        threshold_start=1,
        threshold_beta=0.9,
        dead_tokens=1,
    )
    assert make_runs(lists_of(words), schedule, Scale(norm_factor=1.0, displacement=0.3), DATA)


def test_the_paper_s_sweeps_are_as_large_as_the_page_says():
    schedule = Schedule(
        warmup_steps=1000,
        decay_start=195_312,
        sparsity_warmup_steps=5000,
        anneal_start=10_000,
        threshold_start=1000,
        threshold_beta=0.999,
        dead_tokens=10_000_000,
    )
    scale = Scale(norm_factor=1.0, displacement=0.3)
    sizes = [len(make_runs(lists_of(words), schedule, scale, DATA)) for words in TRAIN[:4]]
    assert sizes == [48, 24, 48, 24]
    assert "is 48 SAEs" in TEXT
    assert "24 noise controls" in TEXT
    assert {options_of(words).tokens for words in TRAIN[:4]} == {"500M"}


def rows_of(header: str) -> list[list[str]]:
    """The cells of the table with this header."""
    body = TEXT[TEXT.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def test_the_disk_that_is_promised_is_what_the_format_needs():
    for _, d_model, rows, promised in rows_of("| model | d_model | rows | cache |"):
        n_bytes = int(rows.removesuffix("M")) * 10**6 * (2 * int(d_model) * 2 + COLUMN_BYTES)
        assert promised == f"{n_bytes / 1e12:.2f} TB"


def test_the_column_bytes_are_those_of_a_cache_with_one_masked_variant():
    from cache_fixtures import make_plan

    from cache_spec import column_types

    plan = make_plan()
    types = column_types(plan)
    masked = [name for name in types if name.startswith("token_")]
    others = sum(types[name].itemsize for name in types if name not in masked)
    assert others + types[masked[0]].itemsize == COLUMN_BYTES


def test_the_memory_that_is_promised_is_what_the_plan_counts():
    for what, parameters, training, checkpoint in rows_of("| SAE | parameters | in training | one checkpoint |"):
        d_model, d_sae = map(int, re.findall(r"\d+", what))
        n = n_parameters(run_config(d_sae=d_sae), d_model, d_model)
        assert float(parameters.removesuffix("M")) == pytest.approx(n / 1e6, rel=0.01)
        assert float(training.removesuffix(" GB")) == pytest.approx(_STATE_BYTES * n / 1e9, abs=0.01)
        assert float(checkpoint.removesuffix(" GB")) == pytest.approx(_SAVED_BYTES * n / 1e9, abs=0.01)


def test_the_operations_and_hours_follow_from_the_formula():
    widths = {"Pythia-160M": 768, "Gemma-2-2B": 2304}
    for sweep, operations, hours in rows_of("| sweep | operations | at a sustained 40 TFLOP/s |"):
        model, saes, _ = sweep.split(", ")
        n = 10 * widths[model] * 4096 * 500e6 * int(saes.split()[0])
        assert float(operations) == pytest.approx(n, rel=0.03)
        assert float(hours.removesuffix(" h")) == pytest.approx(n / 40e12 / 3600, rel=0.01)
    assert "computed, not measured" in TEXT


def sentences(*rooms: str) -> list[str]:
    """Every string in the source, with … where something is put in."""
    found = []
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
    return found


QUOTES = [row[0].strip("`") for row in rows_of("| it says | it means |")]


@pytest.mark.parametrize("quote", QUOTES)
def test_every_quoted_sentence_is_in_the_source(quote):
    """Each piece between two … stands in one string of the source, in this order if they are in the same."""
    pieces = [piece.strip(" ;:()") for piece in quote.split("…")]
    known = sentences("train", "evaluate", "cache_spec")
    for piece in filter(None, pieces):
        assert any(piece in sentence for sentence in known), piece


def test_options_named_in_the_text_exist():
    known = {
        option
        for room in ("train", "harvest", "evaluate")
        for parameter in get_command(import_module(f"{room}.__main__").app).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for option in re.findall(r"`(--[a-z-]+)", TEXT):
        assert option in known, option
