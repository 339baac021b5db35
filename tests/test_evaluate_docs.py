"""docs/evaluation.md: every metric and column that it names exists, and every command parses."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from evaluate.__main__ import app
from evaluate.columns import Column
from evaluate.compare import HIGHER, LOWER, NONE_SEEN, NOT_MATCHED
from evaluate.names import available, find
from evaluate.recipes import MATCHED, ORACLE, PERMUTED, RANDOM

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()


def rows() -> dict[str, tuple[str, str]]:
    """metric -> (what it measures, what it needs), from the table."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")
    ]
    return {name.strip("`"): (measures, needs) for name, measures, needs in cells}


def test_every_metric_has_its_line():
    assert sorted(rows()) == available()


@pytest.mark.parametrize("metric", available())
def test_the_columns_it_names_are_the_metrics(metric):
    columns: dict[str, Column] = dict(find(metric).columns)
    measures = rows()[metric][0]
    for name in re.findall(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b", measures):
        pattern = re.escape(name).replace("_k_", r"_\d+_")
        assert any(re.match(pattern, column) for column in columns), f"{metric} has no column {name}"


def test_verdicts_and_controls_are_called_as_in_the_code():
    for word in (LOWER, HIGHER, NONE_SEEN, NOT_MATCHED, MATCHED, RANDOM, PERMUTED, ORACLE):
        assert f"`{word}`" in PAGE.replace("\n", " "), word


def test_its_commands_parse():
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "evaluate"]
        get_command(app).make_context("evaluate", words[3:])
