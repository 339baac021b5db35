"""A file name is a name: evaluate/metrics/foo.py defines `foo` and COLUMNS, and `--metrics foo` finds it.

A metric that reads labelled text says `NEEDS_LANGUAGE = True`.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache_spec.errors import UserError
from evaluate.columns import Column

if TYPE_CHECKING:  # importing it takes torch, and --help lists the metrics
    from evaluate.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named function of a subject, and what its numbers mean."""

    name: str
    measure: Callable[["Subject"], dict[str, float]]
    columns: Mapping[str, Column]
    needs_language: bool


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
        needs_language=module.NEEDS_LANGUAGE,
    )
