"""The words of the report: labels of recipes, numbers, the sentences of the verdict, the table of the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from evaluate.columns import Column
from evaluate.compare import TRAINED, Difference, Estimate, Recipe

FOCUS = {  # what the first sentence is about: the first of these that was measured
    "full_absorption_cross_token": "cross-token absorption",
    "mean_full_absorption_score": "absorption",
    "explained_variance": "explained variance",
}
FAMILIES = {  # what else the verdict gives in short
    "full_absorption_same_token": "same-token absorption",
    "full_absorption_two_token": "two-token absorption",
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


def sentence(differences: Sequence[Difference], unreliable: Mapping[str, str] = MappingProxyType({})) -> str:
    """The verdict on masking in a few sentences, on the first measured column of FOCUS.

    What every masked recipe changed, what noise of matched strength changed, the other families of absorption, and
    whether the column can be trusted here.
    """
    masked = [difference for difference in differences if difference.recipe.is_masked]
    for column, what in FOCUS.items():
        found = [difference for difference in masked if difference.column == column]
        plain = [difference for difference in found if difference.baseline.is_plain]
        if not plain:
            continue
        names = list(dict.fromkeys(difference.recipe.name for difference in plain))
        clauses = [_clause([d for d in plain if d.recipe.name == name], what) for name in names[:MAX_CLAUSES]]
        if len(names) > MAX_CLAUSES:
            clauses.append(f"{len(names) - MAX_CLAUSES} more masked recipes are below")
        shown = [d for d in masked if d.recipe.name in names[:MAX_CLAUSES]]
        texts = ["; ".join(clauses), _noise(differences, [d for d in shown if d.column == column])]
        texts.append(_families(shown, column, names[:MAX_CLAUSES]))
        if column in unreliable:
            texts.append(f"{what} is unreliable alone here: {unreliable[column]}")
        return " ".join(f"{text[0].upper()}{text[1:]}." for text in texts if text)
    return (
        "Nothing here says what masking does: "
        "that takes a masked and an unmasked run of the same architecture, k, size and seed."
    )


def _clause(differences: Sequence[Difference], what: str) -> str:
    """What one recipe name changed, in every architecture and size it was trained in."""
    seeds = sorted({difference.n for difference in differences})
    over = " or ".join(map(str, seeds)) + f" seed{'s' * (seeds != [1])}"
    return f"over {over}, '{differences[0].recipe.name}' changed {what} {_changes(differences)}"


def _changes(differences: Sequence[Difference], pattern: str = "of {who} by {mean}") -> str:
    """`of batchtopk by −0.1 (its interval: the verdict), of topk by ...`."""
    among = [difference.recipe for difference in differences]
    changes = []
    for difference in differences:
        if difference.n < 2:
            remark = "one seed says nothing about chance"
        else:
            alone = difference.verdict in CLEAR and not difference.holm
            caveat = ", but not after Holm's correction for all comparisons" if alone else ""
            interval = f"95 % interval {number(difference.low)} to {number(difference.high)}"
            remark = f"{interval}: {difference.verdict}{caveat}"
        if not difference.l0_is_matched:
            remark += f"; L0 not matched, {100 * difference.l0_change:+.0f} %".replace("-", "−")
        who, mean = _who(difference.recipe, among), number(difference.mean, signed=True)
        changes.append(f"{pattern.format(who=who, mean=mean)} ({remark})")
    return ", ".join(changes)


def _who(recipe: Recipe, among: Sequence[Recipe]) -> str:
    """An architecture, with the other facts that differ among some recipes."""
    words = [recipe.arch]
    words += [f"k {recipe.k}"] if len({other.k for other in among}) > 1 else []
    words += [f"{recipe.d_sae} latents"] if len({other.d_sae for other in among}) > 1 else []
    words += [recipe.settings] if recipe.settings else []
    words += [f"({recipe.bench})"] if len({other.bench for other in among}) > 1 else []
    return " ".join(words)


def _noise(differences: Sequence[Difference], masked: Sequence[Difference]) -> str:
    """What noise of matched strength changed, and masked recipes minus noise; empty if there was none."""
    against = [difference for difference in masked if not difference.baseline.is_plain]
    texts = []
    for name in dict.fromkeys(difference.baseline.name for difference in against):
        chosen = [difference for difference in against if difference.baseline.name == name]
        baselines, column = [difference.baseline for difference in chosen], chosen[0].column
        own = [d for d in differences if d.recipe in baselines and d.column == column and d.baseline.is_plain]
        among = [difference.recipe for difference in own]
        changed = ", ".join(f"of {_who(d.recipe, among)} by {number(d.mean, signed=True)}" for d in own)
        minus = f"'{chosen[0].recipe.name}' minus noise"
        first = f"noise of matched strength ('{name}') changed it {changed}; " if own else ""
        texts.append(f"{first}{minus}: {_changes(chosen, '{who} {mean}')}")
    return "; ".join(texts)


def _families(masked: Sequence[Difference], focus: str, names: Sequence[str]) -> str:
    """The same of the other families of absorption, in short; empty where they were not measured."""

    def named(recipe: Recipe) -> str:
        return f" {recipe.name}" if len(names) > 1 else ""

    texts = []
    for column, what in FAMILIES.items():
        found = [d for d in masked if d.column == column and d.baseline.is_plain]
        if column == focus or not found:
            continue
        among = [difference.recipe for difference in found]
        short = [f"{_who(d.recipe, among)}{named(d.recipe)} {number(d.mean, signed=True)} ({d.verdict})" for d in found]
        texts.append(f"{what}: {', '.join(short)}")
    return "; ".join(texts)


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
