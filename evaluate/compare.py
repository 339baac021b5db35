"""Compare recipes: differences paired by seed at matched L0, corrected for their number, and a verdict on each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from evaluate.columns import Column
from evaluate.guards import cautions, unreliable
from evaluate.recipes import (
    TRAINED,
    Recipe,
    Result,
    baseline_of,
    by_recipe,
    noise_controls,
    paired_values,
    summaries,
)
from evaluate.statistics import (
    LEVEL,
    MOST_SEEDS,
    POWER,
    Estimate,
    holm,
    paired_test,
    seeds_needed,
    smallest_effect,
)

L0_TOLERANCE = 0.02
LOWER, HIGHER, NONE_SEEN = "lower", "higher", "no difference seen"
ONE_SEED, NOT_MATCHED = "one seed: no verdict", "L0 not matched"
CLAIM, OTHER = "claim", "other"  # families of comparisons, each corrected for its own number


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A recipe minus its baseline in one column, paired by seed.

    mean, error, low, high, p: of the paired t-test, with a 95 % interval; NaN for a single pair. p_holm: adjusted for
    the n_family comparisons of its family (`family`: "claim" or "other"); NaN where nothing was tested.
    seeds_needed: seeds per arm that would see an effect of this size and spread with 80 % power at 0.05 / n_family;
    None if more than 10,000 or unknown. l0_change: the recipe's clean L0 over its baseline's, minus 1; NaN if unknown.
    """

    recipe: Recipe
    baseline: Recipe
    column: str
    mean: float
    error: float
    low: float
    high: float
    n: int
    p: float
    family: str = OTHER
    p_holm: float = float("nan")
    n_family: int = 0
    seeds_needed: int | None = None
    l0_change: float = float("nan")

    @property
    def l0_matched(self) -> bool:
        """False if the two differ in L0 by more than L0_TOLERANCE, so that other columns are not comparable."""
        return not abs(self.l0_change) > L0_TOLERANCE

    @property
    def verdict(self) -> str:
        """In plain words; "lower" and "higher" only where it survives the correction."""
        if not self.l0_matched:
            return NOT_MATCHED
        if self.n < 2:
            return ONE_SEED
        if not self.p_holm < LEVEL:
            return NONE_SEEN
        return HIGHER if self.mean > 0 else LOWER


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """All that was concluded from the results.

    tables: recipe -> column -> mean over seeds. families: name -> number of comparisons corrected for. cautions:
    sentences on what the numbers cannot show. unreliable: columns that rank a control wrongly here, and how.
    power_notes: (recipe, baseline) -> what differences their seeds can see.
    """

    tables: dict[Recipe, dict[str, Estimate]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    unreliable: dict[str, str] = field(default_factory=dict)
    cautions: list[str] = field(default_factory=list)
    families: dict[str, int] = field(default_factory=dict)
    power_notes: dict[tuple[Recipe, Recipe], str] = field(default_factory=dict)


def compare(results: Sequence[Result], columns: Mapping[str, Column]) -> Comparison:
    """Everything that the report says about the results, from the numbers alone."""
    changes = differences(results, columns)
    return Comparison(
        tables=summaries(results),
        differences=changes,
        unreliable=unreliable(results, columns),
        cautions=cautions(results),
        families={family: sum(d.n_family > 0 and d.family == family for d in changes) for family in (CLAIM, OTHER)},
        power_notes=power_notes(changes, columns),
    )


def compared_columns(columns: Mapping[str, Column]) -> dict[str, str]:
    """Column -> family, of the columns that are compared: those of the claims, and ranked ones with a short name."""
    return {
        name: CLAIM if column.claim else OTHER
        for name, column in columns.items()
        if column.paired and (column.claim or (column.short and column.better))
    }


def differences(results: Sequence[Result], columns: Mapping[str, Column]) -> list[Difference]:
    """Every trained recipe against its baseline, and masked ones against noise of matched strength too.

    In every compared column, over the seeds that both have.
    """
    found = []
    for recipe, baseline, group, others in _pairs_of_recipes(results):
        l0 = paired_values(group, others, "l0")
        change = float(l0[:, 0].mean() / l0[:, 1].mean() - 1) if l0.any(axis=0).all() else float("nan")
        for column, family in compared_columns(columns).items():
            pairs = paired_values(group, others, column)
            if len(pairs):
                test = paired_test((pairs[:, 0] - pairs[:, 1]).tolist())
                found.append(
                    Difference(
                        recipe=recipe,
                        baseline=baseline,
                        column=column,
                        family=family,
                        l0_change=change,
                        mean=test.mean,
                        error=test.error,
                        low=test.low,
                        high=test.high,
                        n=test.n,
                        p=test.p,
                    )
                )
    return _corrected(found)


def _pairs_of_recipes(results: Sequence[Result]) -> Iterator[tuple[Recipe, Recipe, list[Result], list[Result]]]:
    """(recipe, baseline, results of the one, results of the other) of all that is compared."""
    groups = {recipe: group for recipe, group in by_recipe(results).items() if recipe.kind == TRAINED}
    for recipe, group in groups.items():
        for baseline in filter(None, [baseline_of(recipe, groups), *noise_controls(recipe, groups)]):
            yield recipe, baseline, group, groups[baseline]


def _corrected(found: list[Difference]) -> list[Difference]:
    """With Holm's adjusted p-values and the seeds needed; what is not at matched L0 or has one pair is not tested."""
    corrected = list(found)
    for family in (CLAIM, OTHER):
        tested = [i for i, d in enumerate(found) if d.family == family and d.l0_matched and not math.isnan(d.p)]
        for i, p_holm in zip(tested, holm([found[i].p for i in tested]), strict=True):
            difference = found[i]
            deviation = difference.error * math.sqrt(difference.n)
            needed = seeds_needed(difference.mean, deviation, len(tested))
            corrected[i] = replace(difference, p_holm=p_holm, n_family=len(tested), seeds_needed=needed)
    return corrected


def power_notes(changes: Sequence[Difference], columns: Mapping[str, Column]) -> dict[tuple[Recipe, Recipe], str]:
    """(recipe, baseline) -> what their seeds can see in the columns of the claims, and what it would take to see more.

    Of all compared columns where none of those was measured.
    """
    notes = {}
    for pair in dict.fromkeys((d.recipe, d.baseline) for d in changes):
        tested = [d for d in changes if (d.recipe, d.baseline) == pair and d.n_family]
        tested = [d for d in tested if d.family == CLAIM] or tested
        if tested:
            notes[pair] = _power_note(tested, columns)
    return notes


def _power_note(tested: Sequence[Difference], columns: Mapping[str, Column]) -> str:
    n, n_family = tested[0].n, tested[0].n_family
    seen = sum(d.verdict in (LOWER, HIGHER) for d in tested)
    smallest = smallest_effect(n, n_family)
    reach = [
        f"{columns[d.column].short or d.column} {smallest * d.error * math.sqrt(d.n):.3g} "
        f"(seen {d.mean:+.3g}, for which it would take {_seeds(d)})"
        for d in tested
    ]
    return (
        f"{n} pairs of seeds, {seen} of {len(tested)} differences seen; with {POWER:.0%} power at {LEVEL} over "
        f"{n_family} comparisons they see differences from these sizes on: {', '.join(reach)}"
    )


def _seeds(difference: Difference) -> str:
    if difference.seeds_needed is not None:
        return f"{difference.seeds_needed:,} seeds"
    return f"more than {MOST_SEEDS:,} seeds"
