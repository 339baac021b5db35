"""Geometry of the report's pictures: where every mark goes, in percent of its strip. The template draws them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.columns import Column
from evaluate.compare import ORACLE, TRAINED, Difference, Estimate, Recipe, Result
from evaluate.wording import number

N_COLOURS = 8
_MARGIN = 0.06  # of a scale, left free at both ends


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear scale from values to percent of a strip."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float], *, include: Sequence[float] = ()) -> "Scale":
        """A scale that shows all finite values with some room on both sides."""
        finite = [value for value in (*values, *include) if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        room = (high - low) * _MARGIN or 0.5
        return cls(low=low - room, high=high + room)

    def place(self, value: float) -> float:
        """Percent from the low end, held inside the strip."""
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 2)

    def ticks(self, n: int = 5) -> list[tuple[float, str]]:
        """Round values on the scale: (percent, text)."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / n))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= n)
        values = np.arange(math.ceil(self.low / step), math.floor(self.high / step) + 1) * step
        digits = max(0, -math.floor(math.log10(step)))
        return [(self.place(value), f"{value:.{digits}f}".replace("-", "−")) for value in values.tolist()]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of a chart: a label, marks along it, and a text at its end."""

    label: str
    colour: int
    dots: tuple[tuple[float, str], ...] = ()  # (percent, what the mouse shows)
    mean: float | None = None
    span: tuple[float, float] | None = None
    text: str = ""
    clear: bool = False  # the interval excludes 0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Strips on one scale; `zero` is the percent of a reference line."""

    title: str
    note: str
    strips: tuple[Strip, ...]
    ticks: tuple[tuple[float, str], ...]
    zero: float | None = None


def colours(recipes: Iterable[Recipe]) -> dict[Recipe, int]:
    """A colour number per trained recipe name, the same in every architecture; controls have none (-1)."""
    recipes = list(recipes)
    names = [(recipe.name, recipe.d_sae, recipe.settings) for recipe in recipes]
    order = list(dict.fromkeys(name for name, recipe in zip(names, recipes, strict=True) if recipe.kind == TRAINED))
    return {
        recipe: order.index(name) % N_COLOURS if recipe.kind == TRAINED else -1
        for name, recipe in zip(names, recipes, strict=True)
    }


def forest(
    differences: Sequence[Difference],
    columns: Mapping[str, Column],
    named: Mapping[Recipe, str],
    hue: Mapping[Recipe, int],
) -> list[Chart]:
    """One chart per column of paired differences with their intervals, around 0."""
    charts = []
    for column in dict.fromkeys(difference.column for difference in differences):
        rows = [difference for difference in differences if difference.column == column]
        reach = max(_reach(row) for row in rows)
        scale = Scale.around([-reach, reach])
        strips = tuple(
            Strip(
                label=named[row.recipe] + ("" if row.baseline.is_plain else f" minus {row.baseline.name}"),
                colour=hue[row.recipe],
                mean=scale.place(row.mean),
                span=None if math.isnan(row.low) else (scale.place(row.low), scale.place(row.high)),
                text=f"{number(row.mean, signed=True)}  [{number(row.low)}, {number(row.high)}]",
                clear=row.verdict in ("higher", "lower"),
            )
            for row in rows
        )
        better = {"higher": "higher is better", "lower": "lower is better"}[columns[column].better]
        charts.append(
            Chart(
                title=columns[column].short,
                note=f"{columns[column].meaning}; {better}",
                strips=strips,
                ticks=tuple(scale.ticks()),
                zero=scale.place(0.0),
            )
        )
    return charts


def _reach(row: Difference) -> float:
    """How far from 0 a scale must go: the whole interval, but of two seeds (t = 12.7) only a part."""
    if row.n < 3 or math.isnan(row.low):
        return 3 * abs(row.mean) or 1e-3
    return max(abs(row.low), abs(row.high)) or 1e-3


def dot_plot(
    title: str,
    note: str,
    column: str,
    groups: Mapping[Recipe, list[Result]],
    named: Mapping[Recipe, str],
    hue: Mapping[Recipe, int],
) -> Chart | None:
    """Every seed of every recipe as a dot in one column, with the mean as a tick; None if nothing has the column."""
    rows = {
        recipe: [(result.values[column], result.seed) for result in group if column in result.values]
        for recipe, group in groups.items()
    }
    rows = {recipe: values for recipe, values in rows.items() if values}
    if not rows:
        return None
    scale = Scale.around((value for values in rows.values() for value, _ in values), include=(0.0,))
    strips = tuple(
        Strip(
            label=named[recipe],
            colour=hue[recipe],
            dots=tuple((scale.place(value), f"seed {seed}: {number(value)}") for value, seed in values),
            mean=scale.place(float(np.mean([value for value, _ in values]))),
            text=number(float(np.mean([value for value, _ in values]))),
        )
        for recipe, values in rows.items()
    )
    return Chart(title=title, note=note, strips=strips, ticks=tuple(scale.ticks()))


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mark of the scatter plot, in percent from the left and from the top."""

    left: float
    top: float
    label: str
    colour: int
    is_mean: bool
    shape: int  # number of the architecture


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points on two scales."""

    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def scatter(
    x: str, y: str, groups: Mapping[Recipe, list[Result]], named: Mapping[Recipe, str], hue: Mapping[Recipe, int]
) -> Scatter | None:
    """Every seed of the trained recipes, and the mean of each recipe; None if nothing has both columns."""
    pairs = {
        recipe: np.array([(r.values[x], r.values[y]) for r in group if x in r.values and y in r.values])
        for recipe, group in groups.items()
        if recipe.kind == TRAINED
    }
    pairs = {recipe: values for recipe, values in pairs.items() if len(values)}
    if not pairs:
        return None
    together = np.concatenate(list(pairs.values()))
    across, up = Scale.around(together[:, 0].tolist()), Scale.around(together[:, 1].tolist(), include=(0.0,))
    shapes = list(dict.fromkeys(recipe.arch for recipe in pairs))
    points = []
    for recipe, values in pairs.items():
        marks = [(value, False) for value in values.tolist()] + [(values.mean(0).tolist(), True)]
        points += [
            Point(
                left=across.place(a),
                top=100 - up.place(b),
                label=named[recipe],
                colour=hue[recipe],
                is_mean=is_mean,
                shape=shapes.index(recipe.arch),
            )
            for (a, b), is_mean in marks
        ]
    y_ticks = tuple((100 - place, text) for place, text in up.ticks())
    return Scatter(points=tuple(points), x_ticks=tuple(across.ticks()), y_ticks=y_ticks)


@dataclass(frozen=True, kw_only=True)
class ProbeBars:
    """AUC of probes on k latents (or a dense probe) on the usual and on shifted text, as (percent of 0.5..1, text)."""

    label: str
    colour: int
    usual: tuple[float, str]
    shifted: tuple[float, str]


def probe_bars(
    k: int, tables: Mapping[Recipe, Mapping[str, Estimate]], named: Mapping[Recipe, str], hue: Mapping[Recipe, int]
) -> list[ProbeBars]:
    """Bars of every recipe, and of the dense probe on the raw activations last."""
    bars: list[ProbeBars] = []
    scale = Scale(low=0.5, high=1.0)

    def bar(label: str, colour: int, table: Mapping[str, Estimate], name: str) -> ProbeBars:
        ends = [table[f"{name}{tail}"].mean for tail in ("", "_shifted")]
        usual, shifted = ((scale.place(value), number(value)) for value in ends)
        return ProbeBars(label=label, colour=colour, usual=usual, shifted=shifted)

    for recipe, table in tables.items():
        if f"sae_top_{k}_test_auc" in table:
            bars.append(bar(named[recipe], hue[recipe], table, f"sae_top_{k}_test_auc"))
    dense = next((table for table in tables.values() if "llm_test_auc" in table), None)
    if dense is not None:
        bars.append(bar("dense probe on the activation", -1, dense, "llm_test_auc"))
    return bars


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Latents per bin of log10 firing rate: heights in percent of the highest bin of all recipes."""

    label: str
    colour: int
    heights: tuple[float, ...]
    n_dead: str


def histograms(
    densities: Mapping[Recipe, list[np.ndarray]], named: Mapping[Recipe, str], hue: Mapping[Recipe, int]
) -> list[Histogram]:
    """One small histogram per recipe, the mean over its seeds; the oracle's has another meaning and is left out."""
    means = {recipe: np.mean(counts, axis=0) for recipe, counts in densities.items() if recipe.kind != ORACLE}
    highest = max((float(counts.max()) for counts in means.values()), default=0.0) or 1.0
    return [
        Histogram(
            label=named[recipe],
            colour=hue[recipe],
            heights=tuple(round(100 * float(count) / highest, 1) for count in counts),
            n_dead=f"{recipe.d_sae - counts.sum():.0f} of {recipe.d_sae} never fire",
        )
        for recipe, counts in means.items()
    ]
