"""Histograms over latents, overlaid: plain training filled, the other recipes as lines."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from evaluate.cofiring import HISTOGRAM_EDGES
from evaluate.frontier import BOTTOM, Figure, Line, Panel, axes, path_of, x_of, y_of
from evaluate.recipes import SMALL, Recipe, Result
from evaluate.scale import Scale
from evaluate.series import LEARNED, Look, panels

DENSITY, JACCARD = "density_histogram", "jaccard_histogram"
_DENSITY_TICKS = ((-5, "10⁻⁵"), (-4, "10⁻⁴"), (-3, "10⁻³"), (-2, "1 %"), (-1, "10 %"), (0, "1"))
_JACCARD_TICKS = ((-4, "10⁻⁴"), (-3, "10⁻³"), (-2, "0.01"), (-1, "0.1"), (0, "1"))


def mean_profiles(name: str, groups: Mapping[Recipe, Sequence[Result]]) -> dict[Recipe, np.ndarray]:
    """Recipe -> the mean over its seeds of a profile [n_bins], for learned dictionaries that have one."""
    found = {}
    for recipe, group in groups.items():
        profiles = [result.profiles[name] for result in group if name in result.profiles]
        if recipe.kind in LEARNED and profiles and len({len(profile) for profile in profiles}) == 1:
            found[recipe] = np.mean(np.array(profiles, dtype=float), axis=0)
    return {recipe: counts for recipe, counts in found.items() if counts.sum() > 0}


def density(groups: Mapping[Recipe, Sequence[Result]], looks: Mapping[Recipe, Look]) -> Figure | None:
    """Latents in each bin of log10 firing rate from -5 to 0, one panel an architecture and k; None without any."""
    means = mean_profiles(DENSITY, groups)
    if not means:
        return None
    up = Scale(low=0.0, high=1.05 * max(float(counts.max()) for counts in means.values()))
    figure = Figure(
        title="How often latents fire",
        note="latents by the share of clean held-out tokens they fire on, mean over seeds; "
        "the ones that never fire are in none of the bins",
        x_label="share of tokens (powers of ten)",
        y_label="latents",
    )
    return _overlay(figure, means, looks, Scale(low=-5.0, high=0.0), up, _DENSITY_TICKS)


def jaccard(groups: Mapping[Recipe, Sequence[Result]], looks: Mapping[Recipe, Look]) -> Figure | None:
    """Share of pairs of latents in each bin of their Jaccard index, plain and masked recipes only; None without any.

    The bins are HISTOGRAM_EDGES of evaluate/cofiring.py: equal in log10, and a first one for all that is smaller.
    """
    means = mean_profiles(JACCARD, groups)
    shares = {
        recipe: counts / counts.sum()
        for recipe, counts in means.items()
        if (recipe.is_plain and recipe.control != SMALL) or recipe.is_masked
    }
    if not shares:
        return None
    smallest = min(float(share[share > 0].min()) for share in shares.values())
    up = Scale(low=smallest / 2, high=2.0, is_log=True)
    figure = Figure(
        title="How often two latents fire together",
        note="share of the pairs of latents by their Jaccard index (tokens with both / tokens with either), "
        "plain training filled, masked as lines, mean over seeds; the first bin has all below 10⁻⁴; both scales are by "
        "powers of ten",
        x_label="Jaccard index",
        y_label="share of pairs",
    )
    edges = np.log10(HISTOGRAM_EDGES[1:])
    across = Scale(low=float(2 * edges[0] - edges[1]), high=float(edges[-1]))
    return _overlay(figure, shares, looks, across, up, _JACCARD_TICKS)


def _overlay(
    figure: Figure,
    heights: Mapping[Recipe, np.ndarray],
    looks: Mapping[Recipe, Look],
    across: Scale,
    up: Scale,
    ticks: Sequence[tuple[float, str]],
) -> Figure:
    """Panels of steps over equal bins of the scale across; what is plain is filled."""
    placed = tuple((x_of(across, value), text) for value, text in ticks)
    made = []
    for title, recipes in panels(heights, by_k=True).items():
        lines = []
        for recipe in recipes:
            is_plain = recipe.is_plain and recipe.control != SMALL
            path = steps(heights[recipe], across, up, closed=is_plain)
            lines.append(Line(look=looks[recipe], path=path, area=is_plain))
        names = ", ".join(line.look.label for line in lines)
        panel = Panel(title=title, text=f"{title}: {figure.note}; {names}", lines=tuple(lines), **axes(across, up))
        made.append(replace(panel, x_ticks=placed))
    return replace(figure, panels=tuple(made))


def steps(heights: np.ndarray, across: Scale, up: Scale, *, closed: bool) -> str:
    """The outline of a histogram of equal bins; `closed`: down to the axis at both ends."""
    edges = np.linspace(across.low, across.high, len(heights) + 1).tolist()
    points = []
    for left, right, height in zip(edges, edges[1:], heights.tolist(), strict=False):
        y = y_of(up, max(height, up.low))
        points += [(x_of(across, left), y), (x_of(across, right), y)]
    if closed:
        points = [(points[0][0], BOTTOM), *points, (points[-1][0], BOTTOM)]
    return path_of(points) + "Z" * closed
