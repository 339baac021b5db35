"""Pictures on two axes: one line a treatment across L0, and reconstruction against absorption. In SVG units."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evaluate.columns import Column, column_of
from evaluate.figures import Chart, mean_strips, note_of, oracle_of
from evaluate.recipes import Recipe, Result
from evaluate.scale import Scale, true_minus
from evaluate.series import LEARNED, Look, by_look, panels, several
from evaluate.statistics import Estimate
from evaluate.wording import number

WIDTH, HEIGHT = 330, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 314, 8, 184  # of the plot itself
_MANY_TICKS = 7  # up to so many k are ticks themselves
_DODGE = 2.2  # between marks of equal L0
_REACH = 2.0  # a control may stretch the scale of the trained ones by so many times their range
ACROSS = (  # what is drawn across L0, where it was measured
    "ce_loss_score",
    "explained_variance",
    "full_absorption_same_token",
    "full_absorption_two_token",
    "full_absorption_cross_token",
    "first_letter_mean_full_absorption_score",
    "sae_top_1_test_auc",
    "sae_top_16_test_auc",
    "ood_gap_to_dense_16",
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mark at (x, y), with the ends of its error bars; `text` is what the mouse shows."""

    x: float
    y: float
    text: str
    low: float | None = None  # y of the lower end, below y on the page
    high: float | None = None
    left: float | None = None  # the same across
    right: float | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One treatment: a path, and marks on it. `area`: filled down to the axis, for what others are compared with."""

    look: Look
    path: str = ""
    points: tuple[Point, ...] = ()
    dots: tuple[tuple[float, float], ...] = ()  # single seeds
    area: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small plot; `text` says in words what it shows."""

    title: str
    text: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    references: tuple[tuple[float, str], ...] = ()  # (y, name)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that share their scales; `charts` stand in their place where there is a single k."""

    title: str
    note: str
    x_label: str
    y_label: str
    panels: tuple[Panel, ...] = ()
    charts: tuple[Chart, ...] = ()


def x_of(scale: Scale, value: float) -> float:
    """SVG units from the left of a panel."""
    return round(LEFT + (RIGHT - LEFT) * scale.place(value) / 100, 1)


def y_of(scale: Scale, value: float) -> float:
    """SVG units from the top of a panel."""
    return round(BOTTOM - (BOTTOM - TOP) * scale.place(value) / 100, 1)


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """The d attribute of a path through some points; empty for fewer than two."""
    if len(points) < 2:
        return ""
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def axes(across: Scale, up: Scale) -> dict[str, tuple[tuple[float, str], ...]]:
    """Ticks of a panel, placed."""
    return {
        "x_ticks": tuple((round(LEFT + (RIGHT - LEFT) * p / 100, 1), text) for p, text in across.ticks(6)),
        "y_ticks": tuple((round(BOTTOM - (BOTTOM - TOP) * p / 100, 1), text) for p, text in up.ticks()),
    }


def across_l0(
    name: str,
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    columns: Mapping[str, Column],
    looks: Mapping[Recipe, Look],
) -> Figure | None:
    """A column against the measured clean L0, one panel an architecture, one line a treatment; None if not measured.

    With a single k, means side by side instead.
    """
    having = [r for r, table in tables.items() if name in table and math.isfinite(table[name].mean)]
    within = panels(having)
    if not within:
        return None
    up, left_out = _scale_up(name, tables, having)
    shown = {
        title: [recipe for recipe in recipes if looks[recipe].label not in left_out]
        for title, recipes in within.items()
    }
    column = column_of(columns, name)
    note = note_of(column)
    if left_out and several(having):
        note += f". Off the scale: {_ranges(left_out)}"
    figure = Figure(title=column.short or name, note=note, x_label="L0", y_label=column.short or name)
    if not several(having):
        return replace(figure, charts=tuple(_strip_charts(within, name, tables, looks, up)))
    l0 = {recipe: l0_of(recipe, tables[recipe]) for recipes in shown.values() for recipe in recipes}
    across = Scale.across(value for recipe, value in l0.items() if recipe.kind in LEARNED)
    away = [recipe for recipe, value in l0.items() if not across.low <= value <= across.high]
    shown = {title: [recipe for recipe in recipes if recipe not in away] for title, recipes in shown.items()}
    if away:
        apart: dict[str, list[float]] = {}
        for recipe in away:
            apart.setdefault(looks[recipe].label, []).append(l0[recipe])
        figure = replace(figure, note=f"{note}. At another L0: {_ranges(apart, 1)}")
    made = [_panel(title, recipes, name, tables, looks, l0, across, up) for title, recipes in shown.items()]
    ks = sorted({recipe.k for recipe in l0 if across.low <= recipe.k <= across.high})
    if 1 < len(ks) <= _MANY_TICKS:
        made = [replace(panel, x_ticks=tuple((x_of(across, k), f"{k}") for k in ks)) for panel in made]
    return replace(figure, panels=tuple(made))


def l0_of(recipe: Recipe, table: Mapping[str, Estimate]) -> float:
    """The measured L0 on clean text; the nominal one where it was not measured."""
    return table["l0"].mean if "l0" in table and table["l0"].mean > 0 else float(recipe.k)


def _strip_charts(
    within: Mapping[str, Sequence[Recipe]],
    name: str,
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    looks: Mapping[Recipe, Look],
    scale: Scale,
) -> list[Chart]:
    charts = []
    for title, recipes in within.items():
        oracle = oracle_of(name, tables, recipes[0].bench)
        lines = [oracle] if oracle and scale.low <= oracle[0] <= scale.high else []
        charts.append(mean_strips(title, recipes, name, tables, looks, scale, lines))
    return charts


def _scale_up(
    name: str, tables: Mapping[Recipe, Mapping[str, Estimate]], having: Sequence[Recipe]
) -> tuple[Scale, dict[str, list[float]]]:
    """One scale for all panels: the trained recipes with their errors, and the controls that do not squash them.

    Also the controls that are left out: name -> their values.
    """
    ends = [end for r in having if r.kind in LEARNED for end in _ends(tables[r][name])]
    low, high = min(ends), max(ends)
    room = _REACH * ((high - low) or abs(high) or 1.0)
    controls: dict[str, list[float]] = {}
    for recipe in having:
        if recipe.kind not in LEARNED and recipe.arch:
            controls.setdefault(recipe.kind, []).append(tables[recipe][name].mean)
    oracles = [oracle_of(name, tables, bench) for bench in dict.fromkeys(r.bench for r in having)]
    fit = [value for values in [*controls.values(), [o[0] for o in oracles if o]] for value in values]
    fit = [value for value in fit if low - room <= value <= high + room]
    left_out = {
        label: values
        for label, values in controls.items()
        if not all(low - room <= value <= high + room for value in values)
    }
    return Scale.around(ends, include=fit), left_out


def _ranges(values: Mapping[str, Sequence[float]], decimals: int = 3) -> str:
    """`untrained 0.200 to 0.310, permuted decoder 0.400`."""
    texts = []
    for label, found in values.items():
        ends = list(dict.fromkeys(true_minus(f"{end:.{decimals}f}") for end in (min(found), max(found))))
        texts.append(f"{label} {' to '.join(ends)}")
    return ", ".join(texts)


def _ends(estimate: Estimate) -> tuple[float, float]:
    error = 0.0 if math.isnan(estimate.error) else estimate.error
    return estimate.mean - error, estimate.mean + error


def _panel(
    title: str,
    recipes: Sequence[Recipe],
    name: str,
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    looks: Mapping[Recipe, Look],
    l0: Mapping[Recipe, float],
    across: Scale,
    up: Scale,
) -> Panel:
    lines, words = [], []
    treatments = by_look(recipes, looks)
    for i, (look, group) in enumerate(treatments.items()):
        dodge = (i - (len(treatments) - 1) / 2) * _DODGE
        points = []
        for recipe in sorted(group, key=lambda recipe: l0[recipe]):
            found = tables[recipe][name]
            low, high = _ends(found)
            has_error = high > low
            points.append(
                Point(
                    x=round(x_of(across, l0[recipe]) + dodge, 1),
                    y=y_of(up, found.mean),
                    low=y_of(up, low) if has_error else None,
                    high=y_of(up, high) if has_error else None,
                    text=f"{look.label}: {number(found.mean)} at L0 {l0[recipe]:.1f}",
                )
            )
        lines.append(Line(look=look, points=tuple(points), path=path_of([(p.x, p.y) for p in points])))
        in_order = sorted(group, key=lambda recipe: l0[recipe])
        words.append(f"{look.label} {', '.join(number(tables[recipe][name].mean) for recipe in in_order)}")
    oracle = oracle_of(name, tables, recipes[0].bench) if recipes else None
    inside = oracle is not None and up.low <= oracle[0] <= up.high
    return Panel(
        title=title,
        text=f"{title}, from low to high L0: {'; '.join(words)}",
        lines=tuple(lines),
        references=((y_of(up, oracle[0]), oracle[1]),) if oracle and inside else (),
        **axes(across, up),
    )


def frontier(
    x: str,
    y: str,
    groups: Mapping[Recipe, Sequence[Result]],
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    columns: Mapping[str, Column],
    looks: Mapping[Recipe, Look],
) -> Figure | None:
    """Every trained recipe on two columns: its mean with errors, its seeds, and a line along k. None if unmeasured."""
    having = [r for r, table in tables.items() if r.kind in LEARNED and {x, y} <= table.keys()]
    within = panels(having)
    if not within:
        return None
    seeds = {r: [(s.values[x], s.values[y]) for s in groups[r]] for r in having}
    across = Scale.around(end for r in having for end in (*_ends(tables[r][x]), *(a for a, _ in seeds[r])))
    up = Scale.around(
        (end for r in having for end in (*_ends(tables[r][y]), *(b for _, b in seeds[r]))), include=(0.0,)
    )
    is_single = not several(having)
    made = []
    for title, recipes in within.items():
        lines = []
        for look, group in by_look(recipes, looks).items():
            points = [_frontier_point(look, tables[r][x], tables[r][y], across, up) for r in group]
            dots = [(x_of(across, a), y_of(up, b)) for r in group for a, b in seeds[r]] if is_single else []
            path = path_of([(p.x, p.y) for p in points])
            lines.append(Line(look=look, points=tuple(points), dots=tuple(dots), path=path))
        text = "; ".join(f"{line.look.label} {', '.join(p.text for p in line.points)}" for line in lines)
        made.append(Panel(title=title, text=f"{title}: {text}", lines=tuple(lines), **axes(across, up)))
    across_column, up_column = column_of(columns, x), column_of(columns, y)
    return Figure(
        title=f"{across_column.short or x} against {up_column.short or y}",
        note=up_column.meaning,
        x_label=across_column.short or x,
        y_label=up_column.short or y,
        panels=tuple(made),
    )


def _frontier_point(look: Look, a: Estimate, b: Estimate, across: Scale, up: Scale) -> Point:
    (left, right), (low, high) = _ends(a), _ends(b)
    return Point(
        x=x_of(across, a.mean),
        y=y_of(up, b.mean),
        left=x_of(across, left) if right > left else None,
        right=x_of(across, right) if right > left else None,
        low=y_of(up, low) if high > low else None,
        high=y_of(up, high) if high > low else None,
        text=f"{number(b.mean)} at {number(a.mean)}",
    )
