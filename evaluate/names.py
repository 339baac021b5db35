"""A file name is a name: evaluate/metrics/foo.py defines `foo` and COLUMNS, and `--metrics foo` finds it.

NEEDS names the fields of the Bench without which there is nothing to measure (`NEEDS = ("language",)`), WANTS those
that add columns where they are there.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache_spec.errors import UserError
from evaluate.columns import Column

Measurements = dict[str, float | list[float]]

if TYPE_CHECKING:  # importing it takes torch, and --help lists the metrics
    from evaluate.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named function of a subject, and what its numbers mean.

    It returns column -> number, or -> a list of numbers: a histogram, which is drawn and not compared. `name@part` is a
    part of column `name`, such as one task of many; parts are in report.json and are not compared.
    """

    name: str
    measure: Callable[["Subject"], Measurements]
    columns: Mapping[str, Column]
    needs: tuple[str, ...]
    wants: tuple[str, ...]


def available() -> list[str]:
    """The metrics that exist."""
    return sorted(path.stem for path in (Path(__file__).parent / "metrics").glob("[!_]*.py"))


def find(name: str) -> Metric:
    """The metric of a name; raises UserError with the names that exist."""
    if name not in available():
        raise UserError(f"there is no metric '{name}'; there are {', '.join(available())}")
    module = importlib.import_module(f"evaluate.metrics.{name}")
    return Metric(
        name=name,
        measure=getattr(module, name),
        columns=module.COLUMNS,
        needs=module.NEEDS,
        wants=module.WANTS,
    )
