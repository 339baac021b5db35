"""The words of the report: labels of recipes, numbers, the sentence of the verdict, the table of the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence

from cache_spec.untrusted import printable
from evaluate.columns import Column, column_of
from evaluate.compare import (
    CLAIM,
    HIGHER,
    LOWER,
    NOT_MATCHED,
    OTHER,
    POOLED_CLAIM,
    POOLED_OTHER,
    Comparison,
    Difference,
    visible,
)
from evaluate.recipes import DROPOUT, NOISE, TRAINED, Recipe
from evaluate.scale import true_minus
from evaluate.statistics import LEVEL, Estimate

DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", "": ""}
# What the first sentence counts: (beginnings of the columns, what lower and higher are called, what it is of)
_CLAIMS = (
    (("full_absorption_", "first_letter_"), "lowered", "raised", "absorption"),
    (("sae_top_",), "lowered", "raised", "probing AUC"),
    (("ood_gap_",), "narrowed", "widened", "the OOD gap"),
    (("explained_variance",), "lowered", "raised", "explained variance"),
)
_FAMILIES = {
    CLAIM: "the columns of the claims, masked against unmasked training",
    OTHER: "other columns and controls",
    POOLED_CLAIM: "the columns of the claims, averaged over architectures and k",
    POOLED_OTHER: "other columns and controls, averaged so",
}
WHO = ("masked", "noise", "masked minus noise")
_FEW = 3  # comparisons that are listed one by one; more are counted
MAX_ROWS = 40  # of the terminal's table


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
    return true_minus(text)


def error_of(estimate: Estimate) -> str:
    """The standard error, as precise as its mean; empty for a single seed."""
    return "" if math.isnan(estimate.error) else number(estimate.error, like=estimate.mean)


def joined(words: Sequence[str]) -> str:
    """`a, b and c`; empty for nothing."""
    return "".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} and {words[-1]}"


def seeds_of(differences: Iterable[Difference]) -> str:
    """`5 seeds`, or `3 to 5 seeds`."""
    counts = sorted({difference.n for difference in differences})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds"
    return f"{counts[0]} seed{'s' * (counts[0] != 1)}"


def sentence(comparison: Comparison, columns: Mapping[str, Column]) -> str:
    """The verdict on masking in one sentence: how many comparisons of each claim went which way."""
    whole = comparison.pooled or comparison.differences
    masked = [d for d in whole if d.family in (CLAIM, POOLED_CLAIM)]
    if not masked:
        return (
            "Nothing here says what masking does: "
            "that takes a masked and an unmasked run of the same architecture, k, size and seed."
        )
    tested = [difference for difference in masked if difference.n_family]
    if not tested and any(difference.verdict == NOT_MATCHED for difference in masked):
        return "No verdict on masking: no masked run has the L0 of an unmasked one, so they cannot be compared."
    if not tested:
        n = max(difference.n for difference in masked)
        few = "one seed, which says" if n < 2 else "two seeds, which say too little: an interval takes three"
        return f"No verdict on masking: masked and unmasked training share {few}{' nothing about chance' * (n < 2)}."
    changed, unchanged, not_counted = [], [], []
    for starts, lower, higher, what in _CLAIMS:
        those = [difference for difference in tested if difference.column.startswith(starts)]
        found = [d for d in those if not flag(d.column, columns, comparison.unreliable)]
        not_counted += [column_of(columns, d.column).short or d.column for d in those if d not in found]
        if clause := _clause(found, lower, higher, what, first=not changed):
            changed.append(clause)
        elif found:
            unchanged.append(f"{what} (0 of {len(found)}, blind below {_unseen(found)})")
    over = f"Over {seeds_of(tested)} at matched L0" + ", averaged over architectures and k" * bool(comparison.pooled)
    left = f"; unreliable here and not counted: {joined(list(dict.fromkeys(not_counted)))}" if not_counted else ""
    none_seen = joined(unchanged)
    if changed:
        rest = f"; no difference seen in {none_seen}" if unchanged else ""
        return f"{over}, masking {joined(changed)}{rest}{left}."
    if unchanged:
        return f"{over}, no difference is seen between masked and unmasked training in {none_seen}{left}."
    return "No verdict on masking: nothing that the claims are about was measured."


def _clause(differences: Sequence[Difference], lower: str, higher: str, what: str, *, first: bool) -> str:
    """`lowered absorption in 3 of 27 (raised in 1)`; empty if no difference was seen."""
    n_lower, n_higher = (sum(d.verdict == word for d in differences) for word in (LOWER, HIGHER))
    total = f"{len(differences)}{' comparisons with unmasked training' * first}"
    if n_lower and n_higher:
        return f"{lower} {what} in {n_lower} of {total} ({higher} in {n_higher})"
    if n_lower or n_higher:
        return f"{lower if n_lower else higher} {what} in {n_lower or n_higher} of {total}"
    return ""


def _unseen(differences: Sequence[Difference]) -> str:
    """The differences that the seeds might miss, in short: of the clearest comparison and of the least clear."""
    ends = [f"{end(visible(difference) for difference in differences):.2g}" for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def claim_columns(differences: Sequence[Difference], columns: Mapping[str, Column]) -> list[str]:
    """The claim columns that were compared, in the order of the claims."""
    names = {difference.column for difference in differences if column_of(columns, difference.column).claim}
    starts = [start for each, _, _, _ in _CLAIMS for start in each]

    def place(name: str) -> int:
        return next((i for i, start in enumerate(starts) if name.startswith(start)), len(starts))

    return sorted((name for name in columns if name in names), key=place)


def verdict_rows(comparison: Comparison, columns: Mapping[str, Column]) -> list[tuple[str, str, list[str]]]:
    """For each claim column its name, what is wrong with it here, and a text for each of WHO (empty without any)."""
    rows = []
    whole = comparison.pooled or comparison.differences
    for name in claim_columns(whole, columns):
        found = [difference for difference in whole if difference.column == name]
        plain = [difference for difference in found if difference.baseline.is_plain]
        groups = (
            [difference for difference in plain if difference.recipe.is_masked],
            [difference for difference in plain if difference.recipe.control in (NOISE, DROPOUT)],
            [difference for difference in found if not difference.baseline.is_plain],
        )
        if any(groups):
            texts = [tally(group) if group else "" for group in groups]
            rows.append((column_of(columns, name).short or name, flag(name, columns, comparison.unreliable), texts))
    return rows


def verdict_lines(comparison: Comparison, columns: Mapping[str, Column]) -> list[str]:
    """A line for each claim column: what masked recipes changed, what noise did, and masked minus noise."""
    lines = []
    for name, fault, texts in verdict_rows(comparison, columns):
        parts = [f"{who} {text}" for who, text in zip(WHO, texts, strict=True) if text]
        parts += [f"unreliable alone: {fault}"] if fault else []
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def tally(differences: Sequence[Difference]) -> str:
    """A few comparisons by their verdicts: `lower (batchtopk −0.120, topk −0.090)`; of many, their numbers."""
    words = list(dict.fromkeys([LOWER, HIGHER, *(difference.verdict for difference in differences)]))
    by_verdict = {word: [d for d in differences if d.verdict == word] for word in words}
    by_verdict = {word: found for word, found in by_verdict.items() if found}
    if len(differences) == 1:
        (difference,) = differences
        has_interval = not math.isnan(difference.low)
        interval = f" [{number(difference.low)}, {number(difference.high)}]" if has_interval else ""
        return f"{difference.verdict} ({number(difference.mean, signed=True)}{interval})"
    if len(differences) <= _FEW:
        recipes = [difference.recipe for difference in differences]
        listed = {
            word: ", ".join(f"{_who(d.recipe, recipes)} {number(d.mean, signed=True)}".strip() for d in found)
            for word, found in by_verdict.items()
        }
        return ", ".join(f"{word} ({each})" for word, each in listed.items())
    means = [difference.mean for difference in differences]
    ends = f"{number(min(means), signed=True)} to {number(max(means), signed=True)}"
    counts = ", ".join(f"{word} in {len(found)}" for word, found in by_verdict.items())
    return f"{counts} of {len(differences)} (means {ends})"


def _who(recipe: Recipe, among: Sequence[Recipe]) -> str:
    """The facts of a recipe that differ among some recipes."""
    facts = {
        recipe.arch: {other.arch for other in among},
        recipe.name: {other.name for other in among},
        f"k {recipe.k}": {other.k for other in among},
        f"{recipe.d_sae} latents": {other.d_sae for other in among},
        recipe.settings: {other.settings for other in among},
        f"({recipe.bench})": {other.bench for other in among},
    }
    return " ".join(word for word, values in facts.items() if len(values) > 1 and word)


def flag(name: str, columns: Mapping[str, Column], unreliable: Mapping[str, str]) -> str:
    """What is wrong with a column, here or everywhere; empty if nothing."""
    known = "" if column_of(columns, name).reliable else "it is known not to rank SAEs; its meaning says why"
    return unreliable.get(name, known)


def faults(unreliable: Mapping[str, str], columns: Mapping[str, Column]) -> list[tuple[str, str]]:
    """(names of columns, what is wrong with them), one entry per fault; columns with a short name come first."""
    groups: dict[str, list[str]] = {}
    for name, fault in unreliable.items():
        groups.setdefault(fault, []).append(name)
    entries = []
    for fault, names in groups.items():
        names.sort(key=lambda name: not column_of(columns, name).short)
        entries.append((", ".join(column_of(columns, name).short or name for name in names), fault))
    return entries


def multiplicity(comparison: Comparison) -> list[str]:
    """For each family of comparisons: how many there are, and how many intervals exclude 0."""
    if comparison.differences and not any(difference.n_family for difference in comparison.differences):
        return ["Nothing was tested: no comparison at matched L0 has three seeds."]
    lines = []
    for family, who in _FAMILIES.items():
        found = [d for d in (*comparison.differences, *comparison.pooled) if d.family == family]
        tested = [difference for difference in found if difference.n_family]
        if not tested:
            continue
        n_out = sum(difference.low > 0 or difference.high < 0 for difference in tested)
        n_holm = sum(difference.p_holm < LEVEL for difference in tested)
        lines.append(
            f"{len(tested)} paired comparisons were tested in {who}; by chance alone about {len(tested) / 20:.1f} of "
            f"their 95 % intervals would exclude 0. Here {n_out} do{'es' * (n_out == 1)}, and "
            f"{n_holm} stay{'s' * (n_holm == 1)} significant after Holm's correction for their number."
        )
    return lines


def pair(recipe: Recipe, baseline: Recipe) -> str:
    """`batchtopk masked 0.5 minus unmasked, k 6`."""
    words = [recipe.arch, recipe.name, "minus", baseline.name]
    words += [f"({recipe.d_sae} and {baseline.d_sae} latents)"] if recipe.d_sae != baseline.d_sae else []
    return " ".join(words) + f", k {recipe.k}" + f", {recipe.settings}" * bool(recipe.settings)


def terminal_table(comparison: Comparison, columns: Mapping[str, Column]) -> str:
    """A compact table of plain text: recipes under their architecture, mean and standard error of a few columns.

    Of many recipes it has the claim columns alone, and the first rows.
    """
    tables = comparison.tables
    is_long = len(tables) > MAX_ROWS
    shown = [
        name
        for name, column in columns.items()
        if (column.claim if is_long else column.terminal) and any(name in table for table in tables.values())
    ]
    named = labels(tables)
    rows = [["", "seeds", *(columns[name].short or name for name in shown)]]
    for recipe, table in list(tables.items())[:MAX_ROWS]:
        n = max((estimate.n for estimate in table.values()), default=0)
        label = printable(" ".join(named[recipe].split()))
        rows.append([label, str(n), *(_cell(table[name]) if name in table else "" for name in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines + [f"… {len(tables) - MAX_ROWS} more in report.html"] * is_long)


def _cell(estimate: Estimate) -> str:
    """`.410±.020`: short, because many stand side by side."""
    return _short(estimate.mean) + ("" if math.isnan(estimate.error) else f"±{_short(estimate.error)}")


def _short(value: float) -> str:
    if math.isnan(value):
        return "–"
    if abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}".replace("0.", ".", 1)
