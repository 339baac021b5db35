"""Compare recipes: differences paired by seed at matched L0, corrected for their number, and a verdict on each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from evaluate.columns import Column
from evaluate.guards import FEWEST_SEEDS, cautions, unreliable
from evaluate.recipes import (
    TRAINED,
    Recipe,
    Result,
    baseline_of,
    by_recipe,
    noise_controls,
    paired_values,
    summaries,
    values_of_seeds,
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
ONE_SEED, TWO_SEEDS, NOT_MATCHED = "one seed: no verdict", "two seeds: no verdict", "L0 not matched"
NOT_ALL = "numbers missing: no verdict"
CLAIM, OTHER = "claim", "other"  # families of comparisons, each corrected for its own number
POOLED_CLAIM, POOLED_OTHER = "pooled claim", "pooled other"
FAMILIES = (CLAIM, OTHER, POOLED_CLAIM, POOLED_OTHER)
ALL = "all"  # the architecture of a recipe that stands for several


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A recipe minus its baseline in one column, paired by seed.

    mean, error, low, high, p: of the paired t-test, with a 95 % interval; NaN for a single pair. p_holm: adjusted for
    the n_family comparisons of its `family`; NaN where nothing was tested. "claim": masked minus unmasked in a column
    of the claims; "other": all else. n_seeds: seeds that both have; some may lack the number.
    seeds_needed: seeds per arm that would see an effect of this size and spread with 80 % power at 0.05 / n_family;
    None if more than 10,000 or unknown. l0_change: the recipe's clean L0 over its baseline's, minus 1; NaN if unknown.
    n_pooled: architectures and k that it is a mean over.
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
    n_seeds: int = 0
    family: str = OTHER
    p_holm: float = float("nan")
    n_family: int = 0
    seeds_needed: int | None = None
    l0_change: float = float("nan")
    n_pooled: int = 1

    @property
    def l0_matched(self) -> bool:
        """False if the two differ in L0 by more than L0_TOLERANCE, so that other columns are not comparable."""
        return not abs(self.l0_change) > L0_TOLERANCE

    @property
    def verdict(self) -> str:
        """In plain words; "lower" and "higher" only where it survives the correction."""
        if not self.l0_matched:
            return NOT_MATCHED
        if self.n < self.n_seeds:
            return NOT_ALL
        if self.n < FEWEST_SEEDS:
            return ONE_SEED if self.n < 2 else TWO_SEEDS
        if not self.p_holm < LEVEL:
            return NONE_SEEN
        return HIGHER if self.mean > 0 else LOWER


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """All that was concluded from the results.

    tables: recipe -> column -> mean over seeds. families: name -> number of comparisons corrected for. cautions:
    sentences on what the numbers cannot show. unreliable: columns that rank a control wrongly here, and how.
    power_notes: (recipe, baseline) -> what differences their seeds can see. pooled: differences averaged over
    architectures and k, where there are several (`pooled.pooled`).
    """

    tables: dict[Recipe, dict[str, Estimate]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    pooled: list[Difference] = field(default_factory=list)
    unreliable: dict[str, str] = field(default_factory=dict)
    cautions: list[str] = field(default_factory=list)
    families: dict[str, int] = field(default_factory=dict)
    power_notes: dict[tuple[Recipe, Recipe], str] = field(default_factory=dict)


def compare(results: Sequence[Result], columns: Mapping[str, Column]) -> Comparison:
    """Everything that the report says about the results, from the numbers alone."""
    changes = differences(results, columns)
    together = pooled(results, columns, changes)
    tested = [difference.family for difference in (*changes, *together) if difference.n_family]
    sizes = {family: tested.count(family) for family in FAMILIES}
    return Comparison(
        tables=summaries(results),
        differences=changes,
        unreliable=unreliable(results, columns),
        cautions=cautions(results, columns),
        pooled=together,
        families={family: n for family, n in sizes.items() if n or family in (CLAIM, OTHER)},
        power_notes=power_notes(changes, columns),
    )


def compared_columns(columns: Mapping[str, Column]) -> dict[str, Column]:
    """The columns that are compared: those of the claims, and ranked ones with a short name."""
    return {
        name: column
        for name, column in columns.items()
        if column.paired and (column.claim or (column.short and column.better))
    }


def is_claim(column: Column, recipe: Recipe, baseline: Recipe) -> bool:
    """Whether a comparison is one that the paper's claims are about: masked against unmasked training."""
    return column.claim and recipe.is_masked and baseline.is_plain


def differences(results: Sequence[Result], columns: Mapping[str, Column]) -> list[Difference]:
    """Every trained recipe against its baseline, and masked ones against noise of matched strength too.

    In every compared column, over the seeds that both have.
    """
    found = []
    for recipe, baseline, group, others in _pairs_of_recipes(results):
        l0_of_seeds, l0 = values_of_seeds(group, others, "l0"), paired_values(group, others, "l0")
        change = float(l0[:, 0].mean() / l0[:, 1].mean() - 1) if l0.any(axis=0).all() else float("nan")
        for name, column in compared_columns(columns).items():
            pairs = paired_values(group, others, name, column)
            if len(pairs):
                family = CLAIM if is_claim(column, recipe, baseline) else OTHER
                facts = {"recipe": recipe, "baseline": baseline, "column": name, "family": family, "l0_change": change}
                test = paired_test((pairs[:, 0] - pairs[:, 1]).tolist())
                found.append(Difference(**facts, **vars(test), n_seeds=len(l0_of_seeds)))
    return corrected(found)


def _pairs_of_recipes(results: Sequence[Result]) -> Iterator[tuple[Recipe, Recipe, list[Result], list[Result]]]:
    """(recipe, baseline, results of the one, results of the other) of all that is compared."""
    groups = {recipe: group for recipe, group in by_recipe(results).items() if recipe.kind == TRAINED}
    for recipe, group in groups.items():
        for baseline in filter(None, [baseline_of(recipe, groups), *noise_controls(recipe, groups)]):
            yield recipe, baseline, group, groups[baseline]


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """With Holm's adjusted p-values and the seeds needed. Not tested is what is not at matched L0, what lacks numbers,
    and what has fewer than 3 pairs."""
    corrected = list(found)
    for family in FAMILIES:
        tested = [i for i, d in enumerate(found) if d.family == family and _may_be_tested(d)]
        for i, p_holm in zip(tested, holm([found[i].p for i in tested]), strict=True):
            difference = found[i]
            deviation = difference.error * math.sqrt(difference.n)
            needed = seeds_needed(difference.mean, deviation, len(tested))
            corrected[i] = replace(difference, p_holm=p_holm, n_family=len(tested), seeds_needed=needed)
    return corrected


def _may_be_tested(difference: Difference) -> bool:
    is_whole = difference.n >= max(FEWEST_SEEDS, difference.n_seeds)
    return difference.l0_matched and is_whole and not math.isnan(difference.p)


def pooled(results: Sequence[Result], columns: Mapping[str, Column], changes: Sequence[Difference]) -> list[Difference]:
    """The same differences averaged over architectures and k, seed by seed: one test for each way of training.

    A seed's differences are averaged over the architectures and k in which every seed has the number at matched L0;
    seeds are then the independent units, as before. [] where nothing was trained in two architectures or k.
    """
    groups = by_recipe(results)
    members: dict[tuple, list[Difference]] = {}
    for d in changes:
        key = (d.recipe.bench, d.recipe.name, d.recipe.d_sae, d.recipe.settings, d.baseline.name, d.column)
        members.setdefault(key, []).append(d)
    found = []
    for among in members.values():
        kept = [d for d in among if d.l0_matched and d.n == d.n_seeds]
        seeds = {d: values_of_seeds(groups[d.recipe], groups[d.baseline], d.column, columns[d.column]) for d in kept}
        common = set.intersection(*(set(values) for values in seeds.values())) if len(kept) > 1 else set()
        if not common:
            continue
        by_seed = [[seeds[d][seed][0] - seeds[d][seed][1] for d in kept] for seed in sorted(common)]
        test = paired_test([sum(values) / len(values) for values in by_seed])
        first = kept[0]
        found.append(
            Difference(
                recipe=replace(first.recipe, arch=ALL, k=0),
                baseline=replace(first.baseline, arch=ALL, k=0),
                column=first.column,
                family=POOLED_CLAIM if first.family == CLAIM else POOLED_OTHER,
                n_seeds=len(common),
                n_pooled=len(kept),
                l0_change=max((d.l0_change for d in kept), key=abs),
                **vars(test),
            )
        )
    return corrected(found)


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
    reach = [
        f"{columns[d.column].short or d.column} {visible(d):.3g} "
        f"(seen {d.mean:+.3g}, for which it would take {_seeds(d)})"
        for d in tested
    ]
    return (
        f"{n} pairs of seeds, {seen} of {len(tested)} differences seen; with {POWER:.0%} power at {LEVEL} over "
        f"{n_family} comparisons they see differences from these sizes on: {', '.join(reach)}"
    )


def visible(difference: Difference) -> float:
    """The smallest difference that its seeds would see with 80 % power, given their spread; NaN if not tested."""
    if not difference.n_family:
        return math.nan
    return smallest_effect(difference.n, difference.n_family) * difference.error * math.sqrt(difference.n)


def _seeds(difference: Difference) -> str:
    if difference.seeds_needed is not None:
        return f"{difference.seeds_needed:,} seeds"
    return f"more than {MOST_SEEDS:,} seeds"
