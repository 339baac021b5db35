"""The words of the report: labels of recipes, numbers, the sentences of the verdict, the table of the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence

from evaluate.columns import Column
from evaluate.compare import TRAINED, Difference, Estimate, Recipe

FOCUS = {  # what the first sentence is about: the first of these that was measured
    "full_absorption_cross_token": "cross-token absorption",
    "mean_full_absorption_score": "absorption",
    "explained_variance": "explained variance",
}
MAX_CLAUSES = 4
CLEAR = ("higher", "lower")  # verdicts of an interval that excludes 0


def labels(recipes: Iterable[Recipe]) -> dict[Recipe, str]:
    """A label for each recipe that names only what differs between them."""
    recipes = list(recipes)
    trained = [recipe for recipe in recipes if recipe.kind == TRAINED]
    several_k = len({recipe.k for recipe in trained}) > 1
    largest = max((recipe.d_sae for recipe in trained), default=0)
    several_benches = len({recipe.bench for recipe in recipes}) > 1
    named = {}
    for recipe in recipes:
        words = [recipe.arch, recipe.name]
        words += [f"k {recipe.k}"] if several_k and recipe.arch else []
        words += [f"{recipe.d_sae} latents"] if recipe.kind == TRAINED and recipe.d_sae != largest else []
        words += [recipe.settings]
        words += [f"({recipe.bench})"] if several_benches else []
        named[recipe] = " ".join(filter(None, words))
    return named


def number(value: float, *, signed: bool = False, like: float | None = None) -> str:
    """Three decimals, or one above 10 (or as many as `like` gets); a true minus sign; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    decimals = 1 if abs(value if like is None else like) >= 10 else 3
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def error_of(estimate: Estimate) -> str:
    """The standard error, as precise as its mean; empty for a single seed."""
    return "" if math.isnan(estimate.error) else number(estimate.error, like=estimate.mean)


def clause(differences: Sequence[Difference], what: str) -> str:
    """What one recipe name changed, in every architecture it was trained in."""
    seeds = sorted({difference.n for difference in differences})
    over = " or ".join(map(str, seeds)) + f" seed{'s' * (seeds != [1])}"
    changes = []
    for difference in differences:
        change = f"of {difference.recipe.arch} by {number(difference.mean, signed=True)}"
        if difference.n < 2:
            changes.append(f"{change} (one seed says nothing about chance)")
        else:
            interval = f"95 % interval {number(difference.low)} to {number(difference.high)}"
            alone = difference.verdict in CLEAR and not difference.holm
            caveat = ", but not after Holm's correction for all comparisons" if alone else ""
            changes.append(f"{change} ({interval}: {difference.verdict}{caveat})")
    return f"over {over}, '{differences[0].recipe.name}' changed {what} {', '.join(changes)}"


def sentence(differences: Sequence[Difference]) -> str:
    """The verdict on masking in one sentence: the first measured column of FOCUS, every masked recipe."""
    masked = [difference for difference in differences if difference.recipe.is_masked]
    for column, what in FOCUS.items():
        found = [difference for difference in masked if difference.column == column]
        if found:
            names = list(dict.fromkeys(difference.recipe.name for difference in found))
            clauses = [clause([d for d in found if d.recipe.name == name], what) for name in names[:MAX_CLAUSES]]
            if len(names) > MAX_CLAUSES:
                clauses.append(f"{len(names) - MAX_CLAUSES} more masked recipes are below")
            text = "; ".join(clauses)
            return f"{text[0].upper()}{text[1:]}."
    return (
        "Nothing here says what masking does: "
        "that takes a masked and an unmasked run of the same architecture, k and seed."
    )


def cautions(unreliable: Mapping[str, str], columns: Mapping[str, Column]) -> list[tuple[str, str]]:
    """(names of columns, what is wrong with them), one entry per fault; columns with a short name come first."""
    groups: dict[str, list[str]] = {}
    for name, fault in unreliable.items():
        groups.setdefault(fault, []).append(name)
    entries = []
    for fault, names in groups.items():
        names.sort(key=lambda name: not columns[name].short)
        entries.append((", ".join(columns[name].short or name for name in names), fault))
    return entries


def multiplicity(differences: Sequence[Difference]) -> str:
    """How many comparisons were made, and how many intervals exclude 0."""
    tested = [difference for difference in differences if difference.n > 1]
    if not tested:
        return "No comparison has more than one seed, so there are no intervals."
    n_out = sum(difference.verdict in CLEAR for difference in tested)
    n_holm = sum(difference.holm for difference in tested)
    return (
        f"{len(tested)} paired comparisons were made; by chance alone about {len(tested) / 20:.0f} of their 95 % "
        f"intervals would exclude 0. Here {n_out} do, and {n_holm} {'is' if n_holm == 1 else 'are'} significant after "
        "Holm's correction for their number."
    )


def terminal_table(tables: Mapping[Recipe, Mapping[str, Estimate]], columns: Mapping[str, Column]) -> str:
    """A compact table of plain text: recipes under their architecture, mean and standard error of a few columns."""
    shown = [
        name for name, column in columns.items() if column.terminal and any(name in table for table in tables.values())
    ]
    named = labels(tables)
    rows = [["", "seeds", *(columns[name].short for name in shown)]]
    for recipe, table in tables.items():
        n = max((estimate.n for estimate in table.values()), default=0)
        rows.append([named[recipe], str(n), *(_cell(table[name]) if name in table else "" for name in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _cell(estimate: Estimate) -> str:
    """`.410±.020`: short, because many stand side by side."""
    return _short(estimate.mean) + ("" if math.isnan(estimate.error) else f"±{_short(estimate.error)}")


def _short(value: float) -> str:
    if math.isnan(value):
        return "–"
    if abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}".replace("0.", ".", 1)
