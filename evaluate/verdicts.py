"""The verdict table: a row for each recipe and k, a cell with interval and verdict for each column of the claims."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluate.columns import Column, column_of
from evaluate.compare import (
    HIGHER,
    LOWER,
    NONE_SEEN,
    NOT_ALL,
    NOT_MATCHED,
    ONE_SEED,
    TWO_SEEDS,
    Comparison,
    Difference,
)
from evaluate.figures import reach_of
from evaluate.recipes import Recipe
from evaluate.scale import Scale
from evaluate.series import Look, panels
from evaluate.statistics import MOST_SEEDS
from evaluate.wording import DIRECTIONS, claim_columns, flag, number

SIGNS = {LOWER: "▼", HIGHER: "▲", NONE_SEEN: "·", NOT_MATCHED: "≠", ONE_SEED: "1", TWO_SEEDS: "2", NOT_ALL: "?"}
GOOD, BAD = "good", "bad"
FEW_ROWS = 12  # a table of so many needs no overview


@dataclass(frozen=True, kw_only=True)
class Head:
    """A column of the table; `flag` says what is wrong with it here, empty if nothing."""

    short: str
    meaning: str
    direction: str
    flag: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison in words, and its interval in percent of a small scale that the column shares."""

    mean: str
    interval: str
    verdict: str
    sign: str
    tone: str  # GOOD, BAD or empty
    seeds: str
    place: float
    span: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe and k."""

    label: str
    k: int
    look: Look
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A treatment: for each column, a line for each architecture with a sign for each k."""

    label: str
    look: Look
    cells: tuple[tuple[tuple[Cell | None, ...], ...], ...]


@dataclass(frozen=True, kw_only=True)
class VerdictTable:
    """Heads, and the rows of each architecture; the overview is empty where there are few rows."""

    heads: tuple[Head, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    overview: tuple[Overview, ...]


def verdict_table(
    comparison: Comparison, columns: Mapping[str, Column], looks: Mapping[Recipe, Look], *, against_noise: bool = False
) -> VerdictTable | None:
    """The differences from unmasked training (or of masked runs from noise) in the claim columns; None without any."""
    shown = [
        difference
        for difference in comparison.differences
        if column_of(columns, difference.column).claim and difference.baseline.is_plain is not against_noise
    ]
    if not shown:
        return None
    names = claim_columns(shown, columns)
    scales = {name: _scale([d for d in shown if d.column == name]) for name in names}
    by_pair: dict[tuple[Recipe, Recipe], dict[str, Cell]] = {}
    for d in shown:
        cell = cell_of(d, columns[d.column].better, scales[d.column])
        by_pair.setdefault((d.recipe, d.baseline), {})[d.column] = cell
    groups = []
    for title, recipes in panels(dict.fromkeys(recipe for recipe, _ in by_pair)).items():
        rows = [
            Row(
                label=looks[recipe].label + (f" − {baseline.name}" if against_noise else ""),
                k=recipe.k,
                look=looks[recipe],
                cells=tuple(by_pair[recipe, baseline].get(name) for name in names),
            )
            for recipe in recipes
            for mine, baseline in by_pair
            if mine == recipe
        ]
        order = list(dict.fromkeys(row.label for row in rows))
        groups.append((title, tuple(sorted(rows, key=lambda row: order.index(row.label)))))
    heads = tuple(head_of(name, columns, comparison.unreliable) for name in names)
    is_long = sum(len(rows) for _, rows in groups) > FEW_ROWS
    return VerdictTable(heads=heads, groups=tuple(groups), overview=_overview(groups, len(names)) if is_long else ())


def cell_of(difference: Difference, better: str, scale: Scale) -> Cell:
    """One comparison as it is shown."""
    has_interval = not math.isnan(difference.low)
    is_seen = difference.verdict in (LOWER, HIGHER)
    tone = "" if not (is_seen and better) else GOOD if difference.verdict == better else BAD
    return Cell(
        mean=number(difference.mean, signed=True),
        interval=f"[{number(difference.low)}, {number(difference.high)}]" if has_interval else "",
        verdict=difference.verdict,
        sign=SIGNS[difference.verdict],
        tone=tone,
        seeds=_seeds(difference),
        place=scale.place(difference.mean),
        span=(scale.place(difference.low), scale.place(difference.high)) if has_interval else None,
    )


def _seeds(difference: Difference) -> str:
    """How many seeds an effect of this size would take; empty where nothing was tested."""
    if not difference.n_family:
        return ""
    if difference.seeds_needed is None:
        return f"n > {MOST_SEEDS:,}"
    return f"n ≥ {difference.seeds_needed:,}"


def _scale(differences: Sequence[Difference]) -> Scale:
    reach = max(reach_of(difference) for difference in differences)
    return Scale(low=-reach, high=reach)


def head_of(name: str, columns: Mapping[str, Column], unreliable: Mapping[str, str]) -> Head:
    """A column's head, with what is wrong with it."""
    column = columns[name]
    return Head(
        short=column.short or name,
        meaning=column.meaning,
        direction=DIRECTIONS[column.better],
        flag=flag(name, columns, unreliable),
    )


def _overview(groups: Sequence[tuple[str, Sequence[Row]]], n_columns: int) -> tuple[Overview, ...]:
    first = {row.label: row for _, rows in groups for row in reversed(rows)}
    found = []
    for label in dict.fromkeys(row.label for _, rows in groups for row in rows):
        cells = tuple(
            tuple(tuple(row.cells[i] for row in rows if row.label == label) for _, rows in groups)
            for i in range(n_columns)
        )
        found.append(Overview(label=label, look=first[label].look, cells=cells))
    return tuple(found)
