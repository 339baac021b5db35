"""Strips: one row a recipe, its marks along a line. Where every mark goes, in percent; the template draws them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.columns import Column, column_of
from evaluate.compare import Difference
from evaluate.recipes import ORACLE, Recipe, Result
from evaluate.scale import Scale
from evaluate.series import Look, panels
from evaluate.statistics import Estimate
from evaluate.wording import DIRECTIONS, claim_columns, error_of, number

_NEAR_L0 = 0.1  # of k


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of a chart: a label, marks along it, and a text at its end."""

    label: str
    look: Look
    dots: tuple[tuple[float, str], ...] = ()  # (percent, what the mouse shows)
    mean: float | None = None
    span: tuple[float, float] | None = None
    text: str = ""
    clear: bool = False  # the interval excludes 0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Strips on one scale; `zero` is the percent of the line of no difference, `lines` are (percent, name)."""

    title: str
    strips: tuple[Strip, ...]
    ticks: tuple[tuple[float, str], ...]
    zero: float | None = None
    lines: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StripFigure:
    """Charts of one column, one for each architecture, on one scale."""

    title: str
    note: str
    charts: tuple[Chart, ...]
    is_open: bool = True


def note_of(column: Column) -> str:
    """What a column means and which end is good."""
    return "; ".join(filter(None, [column.meaning, DIRECTIONS[column.better]]))


def forest(
    differences: Sequence[Difference], columns: Mapping[str, Column], looks: Mapping[Recipe, Look]
) -> list[StripFigure]:
    """One figure per column of paired differences with intervals, around 0; those of the claims come first, open."""
    names = [*claim_columns(differences, columns), *dict.fromkeys(difference.column for difference in differences)]
    figures = []
    for name in dict.fromkeys(names):
        rows = [difference for difference in differences if difference.column == name]
        reach = max(reach_of(row) for row in rows)
        scale = Scale.around([-reach, reach])
        charts = []
        for title, recipes in panels(dict.fromkeys(row.recipe for row in rows)).items():
            suffix = {recipe: f", k\u00a0{recipe.k}" if len({r.k for r in recipes}) > 1 else "" for recipe in recipes}
            here = [(f"{looks[r].label}{_minus(row)}", row) for r in recipes for row in rows if row.recipe == r]
            order = list(dict.fromkeys(label for label, _ in here))
            here.sort(key=lambda pair: order.index(pair[0]))
            strips = [
                _difference_strip(row, label + suffix[row.recipe], looks[row.recipe], scale) for label, row in here
            ]
            charts.append(_chart(title, strips, scale, zero=scale.place(0.0)))
        column = column_of(columns, name)
        title = column.short or name
        figures.append(StripFigure(title=title, note=note_of(column), charts=tuple(charts), is_open=column.claim))
    return figures


def _minus(row: Difference) -> str:
    return "" if row.baseline.is_plain else f" − {row.baseline.name}"


def _difference_strip(row: Difference, label: str, look: Look, scale: Scale) -> Strip:
    return Strip(
        label=label,
        look=look,
        mean=scale.place(row.mean),
        span=None if math.isnan(row.low) else (scale.place(row.low), scale.place(row.high)),
        text=f"{number(row.mean, signed=True)}  [{number(row.low)}, {number(row.high)}]",
        clear=row.low > 0 or row.high < 0,
    )


def reach_of(row: Difference) -> float:
    """How far from 0 a scale must go: the whole interval, but of two seeds (t = 12.7) only a part."""
    if row.n < 3 or math.isnan(row.low):
        return 3 * abs(row.mean) or 1e-3
    return max(abs(row.low), abs(row.high)) or 1e-3


def seed_dots(
    name: str, groups: Mapping[Recipe, Sequence[Result]], columns: Mapping[str, Column], looks: Mapping[Recipe, Look]
) -> StripFigure | None:
    """Every seed of every recipe as a dot in one column, with the mean as a tick; None if nothing has the column."""
    values = {
        recipe: [(result.values[name], result.seed) for result in group if math.isfinite(_value(result, name))]
        for recipe, group in groups.items()
    }
    values = {recipe: pairs for recipe, pairs in values.items() if pairs}
    if not values:
        return None
    scale = Scale.around((value for pairs in values.values() for value, _ in pairs), include=(0.0,))
    charts = []
    for title, recipes in panels(values).items():
        named = labels_within(recipes, looks)
        strips = [
            Strip(
                label=named[recipe],
                look=looks[recipe],
                dots=tuple((scale.place(value), f"seed {seed}: {number(value)}") for value, seed in values[recipe]),
                mean=scale.place(_mean(values[recipe])),
                text=number(_mean(values[recipe])),
            )
            for recipe in recipes
        ]
        charts.append(_chart(title, strips, scale))
    column = column_of(columns, name)
    return StripFigure(title=column.short or name, note=note_of(column), charts=tuple(charts))


def _value(result: Result, name: str) -> float:
    return result.values.get(name, math.nan)


def _mean(pairs: Sequence[tuple[float, int]]) -> float:
    return float(np.mean([value for value, _ in pairs]))


def mean_strips(
    panel: str,
    recipes: Sequence[Recipe],
    name: str,
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    looks: Mapping[Recipe, Look],
    scale: Scale,
    lines: Sequence[tuple[float, str]],
) -> Chart:
    """Means with their standard errors, side by side by recipe: what stands for a line where there is one k.

    An arrow stands for a mark that lies off the scale. lines: values of reference, with their names.
    """
    strips = []
    for recipe in recipes:
        found = tables[recipe][name]
        error = 0.0 if math.isnan(found.error) else found.error
        arrow = "← " if found.mean < scale.low else "→ " if found.mean > scale.high else ""
        strips.append(
            Strip(
                label=looks[recipe].label + other_l0(recipe, tables[recipe]),
                look=looks[recipe],
                mean=None if arrow else scale.place(found.mean),
                span=None if arrow else (scale.place(found.mean - error), scale.place(found.mean + error)),
                text=f"{arrow}{number(found.mean)}{' ±' * bool(error_of(found))}{error_of(found)}",
                clear=True,
            )
        )
    return _chart(panel, strips, scale, lines=[(scale.place(value), text) for value, text in lines])


def _chart(
    title: str,
    strips: Sequence[Strip],
    scale: Scale,
    *,
    zero: float | None = None,
    lines: Sequence[tuple[float, str]] = (),
) -> Chart:
    return Chart(title=title, strips=tuple(strips), ticks=tuple(scale.ticks(4)), zero=zero, lines=tuple(lines))


def labels_within(recipes: Sequence[Recipe], looks: Mapping[Recipe, Look]) -> dict[Recipe, str]:
    """Labels of the recipes of one panel, whose title names their architecture and cache: the treatment, and its k."""
    several_k = len({recipe.k for recipe in recipes if recipe.arch}) > 1
    return {r: looks[r].label + (f", k\u00a0{r.k}" if several_k and r.arch else "") for r in recipes}


def other_l0(recipe: Recipe, table: Mapping[str, Estimate]) -> str:
    """`, L0 256` for what is far from its k, such as an untrained SAE, so that no one compares it unawares."""
    if not recipe.k or "l0" not in table or abs(table["l0"].mean / recipe.k - 1) <= _NEAR_L0:
        return ""
    return f", L0\u00a0{table['l0'].mean:.0f}"


@dataclass(frozen=True, kw_only=True)
class ProbeBars:
    """AUC of probes on the usual and on shifted text, as (percent of 0.5..1, text)."""

    label: str
    look: Look | None
    usual: tuple[float, str]
    shifted: tuple[float, str]


def probe_bars(
    k: int, tables: Mapping[Recipe, Mapping[str, Estimate]], looks: Mapping[Recipe, Look]
) -> dict[str, list[ProbeBars]]:
    """Panel -> bars of its recipes for probes on k latents, the dense probe on the raw activations last."""
    name, dense = f"sae_top_{k}_test_auc", "llm_test_auc"
    having = [recipe for recipe, table in tables.items() if name in table and f"{name}_shifted" in table]
    found = {}
    for title, recipes in panels(having).items():
        named = labels_within(recipes, looks)
        found[title] = [_bar(named[r] + other_l0(r, tables[r]), looks[r], tables[r], name) for r in recipes]
        source = next((tables[r] for r in recipes if dense in tables[r] and f"{dense}_shifted" in tables[r]), None)
        if source is not None:
            found[title].append(_bar("dense probe on the activation", None, source, dense))
    return found


def _bar(label: str, look: Look | None, table: Mapping[str, Estimate], name: str) -> ProbeBars:
    scale = Scale(low=0.5, high=1.0)
    usual, shifted = (
        (scale.place(table[f"{name}{tail}"].mean), number(table[f"{name}{tail}"].mean)) for tail in ("", "_shifted")
    )
    return ProbeBars(label=label, look=look, usual=usual, shifted=shifted)


def oracle_of(name: str, tables: Mapping[Recipe, Mapping[str, Estimate]], bench: str) -> tuple[float, str] | None:
    """The value to draw as a line of reference: the dense probe's of a probing column, else the oracle's."""
    if name.startswith("sae_top_"):
        dense = next((t["llm_test_auc"] for r, t in tables.items() if r.bench == bench and "llm_test_auc" in t), None)
        return None if dense is None else (dense.mean, "dense probe")
    if name.startswith("ood_gap"):
        return 0.0, "dense probe"
    oracle = next((t[name] for r, t in tables.items() if r.bench == bench and r.kind == ORACLE and name in t), None)
    return None if oracle is None else (oracle.mean, "oracle")
