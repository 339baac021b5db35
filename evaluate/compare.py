"""Compare recipes: mean and standard error over seeds, and differences paired by seed."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from evaluate.columns import Column

TRAINED, ORACLE, RANDOM = "trained", "oracle", "untrained"
CONFIDENCE = 0.95
TIE = 1e-9
L0_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True, order=True)
class Recipe:
    """What seeds vary within. `bench` names the cache and hook point; values of different benches are not compared."""

    bench: str
    arch: str
    k: int
    d_sae: int
    name: str
    kind: str = TRAINED
    is_plain: bool = False
    is_masked: bool = False
    settings: str = ""  # what else differs, such as "lr 0.001"; compared are recipes of equal settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The numbers of one dictionary: column -> value."""

    run: str
    recipe: Recipe
    seed: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds; `error` is its standard error, NaN for a single seed."""

    mean: float
    error: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A recipe minus its baseline in one column, paired by seed, with a 95 % t-interval (NaN for a single pair).

    p: of the two-sided paired t-test. holm: it stays below 0.05 after Holm's correction for all comparisons made.
    l0_change: the recipe's L0 over its baseline's, minus 1; NaN where L0 was not measured.
    """

    recipe: Recipe
    baseline: Recipe
    column: str
    mean: float
    low: float
    high: float
    n: int
    p: float
    holm: bool = False
    l0_change: float = float("nan")

    @property
    def l0_is_matched(self) -> bool:
        """False if the two differ in L0 by more than L0_TOLERANCE, so that other columns are not comparable."""
        return not abs(self.l0_change) > L0_TOLERANCE

    @property
    def verdict(self) -> str:
        """In plain words."""
        if self.n < 2:
            return "one seed: no interval"
        if np.isnan(self.low) or self.low <= 0 <= self.high:
            return "not distinguishable from 0"
        return "higher" if self.mean > 0 else "lower"


def by_recipe(results: Iterable[Result]) -> dict[Recipe, list[Result]]:
    """Recipe -> its results in order of seed; recipes sorted, controls last."""
    groups: dict[Recipe, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.recipe].append(result)
    order = sorted(groups, key=lambda recipe: (recipe.bench, recipe.kind != TRAINED, recipe.kind, _place(recipe)))
    return {recipe: sorted(groups[recipe], key=lambda result: result.seed) for recipe in order}


def _place(recipe: Recipe) -> tuple:
    return recipe.arch, recipe.k, recipe.settings, -recipe.d_sae, not recipe.is_plain, not recipe.is_masked, recipe.name


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the values of several seeds."""
    numbers = np.asarray(values, dtype=float)
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else float("nan")
    return Estimate(mean=float(numbers.mean()), error=error, n=len(numbers))


def summaries(results: Iterable[Result]) -> dict[Recipe, dict[str, Estimate]]:
    """Recipe -> column -> estimate, for the columns that every seed of the recipe has."""
    tables: dict[Recipe, dict[str, Estimate]] = {}
    for recipe, group in by_recipe(results).items():
        columns = [name for name in group[0].values if all(name in result.values for result in group)]
        tables[recipe] = {name: estimate([result.values[name] for result in group]) for name in columns}
    return tables


def baseline_of(recipe: Recipe, recipes: Iterable[Recipe]) -> Recipe | None:
    """What a recipe is compared with: plain training of the same kind, of equal size.

    A smaller plain dictionary is compared with the largest plain one.
    """
    plain = [other for other in recipes if other.is_plain and _kind(other) == _kind(recipe)]
    if not recipe.is_plain:
        plain = [other for other in plain if other.d_sae == recipe.d_sae]
    best = max(plain, key=lambda other: other.d_sae, default=None)
    return None if best == recipe else best


def noise_controls(recipe: Recipe, recipes: Iterable[Recipe]) -> list[Recipe]:
    """Corruptions that displace rows as much as a masked recipe does; their names say "(matched 0.5)"."""
    if not recipe.is_masked:
        return []
    fraction = recipe.name.partition(",")[0].removeprefix("masked ")
    same = [other for other in recipes if (_kind(other), other.d_sae) == (_kind(recipe), recipe.d_sae)]
    noise = [other for other in same if f" (matched {fraction})" in other.name.partition(",")[0]]
    return [other for other in noise if _target(other) == _target(recipe)]


def _target(recipe: Recipe) -> list[str]:
    """The part of a name that says what was reconstructed, if not the input itself: ["clean target"]."""
    return [part for part in recipe.name.split(", ") if part.endswith(" target")]


def _kind(recipe: Recipe) -> tuple[str, str, int, str]:
    return recipe.bench, recipe.arch, recipe.k, recipe.settings


def differences(results: Sequence[Result], columns: Sequence[str]) -> list[Difference]:
    """Every trained recipe against its baseline, and masked ones against noise of matched strength too.

    In every column, over the seeds that both have.
    """
    groups = {recipe: group for recipe, group in by_recipe(results).items() if recipe.kind == TRAINED}
    found = []
    for recipe, group in groups.items():
        for baseline in filter(None, [baseline_of(recipe, groups), *noise_controls(recipe, groups)]):
            l0 = _pairs(group, groups[baseline], "l0")
            change = float(l0[:, 0].mean() / l0[:, 1].mean() - 1) if l0.any(axis=0).all() else float("nan")
            for column in columns:
                pairs = _pairs(group, groups[baseline], column)
                if len(pairs):
                    difference = _difference(recipe, baseline, column, pairs[:, 0] - pairs[:, 1])
                    found.append(replace(difference, l0_change=change))
    return _corrected(found)


def _pairs(group: Sequence[Result], baseline: Sequence[Result], column: str) -> np.ndarray:
    """A column's values of equal seeds, [n_pairs, 2]."""
    other = {result.seed: result.values for result in baseline}
    values = [
        (result.values[column], other[result.seed][column])
        for result in group
        if column in result.values and column in other.get(result.seed, {})
    ]
    return np.asarray(values, dtype=float).reshape(-1, 2)


def _difference(recipe: Recipe, baseline: Recipe, column: str, pairs: np.ndarray) -> Difference:
    n, mean = len(pairs), float(pairs.mean())
    low = high = p = float("nan")
    if n > 1:
        error = float(pairs.std(ddof=1) / np.sqrt(n))
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
        low, high = mean - reach, mean + reach
        if error > 0:
            p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
        else:  # every seed gave the same difference
            p = 1.0 if mean == 0 else 0.0
    return Difference(recipe=recipe, baseline=baseline, column=column, mean=mean, low=low, high=high, n=n, p=p)


def _corrected(found: list[Difference]) -> list[Difference]:
    """Mark what stays significant under Holm's step-down correction."""
    tested = sorted((d for d in found if not np.isnan(d.p)), key=lambda d: d.p)
    passed: set[int] = set()
    for rank, difference in enumerate(tested):
        if difference.p > (1 - CONFIDENCE) / (len(tested) - rank):
            break
        passed.add(id(difference))
    return [replace(difference, holm=id(difference) in passed) for difference in found]


def unreliable(results: Sequence[Result], columns: Mapping[str, Column]) -> dict[str, str]:
    """Columns that rank a control wrongly, and how: column -> sentence.

    A column is unreliable here if an untrained SAE beats plainly trained ones of its kind, or if a trained SAE beats
    the oracle, by more than two standard errors of the trained mean (of any amount for a single seed).
    """
    tables = summaries(results)
    found: dict[str, str] = {}
    for recipe, table in tables.items():
        for control, other in tables.items():
            if recipe.kind != TRAINED or control.kind == TRAINED or control.bench != recipe.bench:
                continue
            for name in table.keys() & other.keys():
                if sentence := _fault(columns[name], recipe, table[name], control, other[name]):
                    found.setdefault(name, sentence)
    return dict(sorted(found.items()))


def _fault(column: Column, recipe: Recipe, trained: Estimate, control: Recipe, other: Estimate) -> str:
    """What is wrong with how a column ranks a trained recipe and a control; empty if nothing."""
    if not column.better:
        return ""
    margin = 0.0 if np.isnan(trained.error) else 2 * trained.error
    lead = (trained.mean - other.mean) * (1.0 if column.better == "higher" else -1.0)
    if control.kind == ORACLE and column.oracle_is_best and lead > margin + TIE:
        return f"{recipe.arch} {recipe.name} scores better than the oracle, which knows the answers"
    same_size = (control.k, control.settings, control.d_sae) == (recipe.k, recipe.settings, recipe.d_sae)
    same_size = same_size and recipe.arch in control.arch.split(", ")  # one untrained SAE may stand for several
    if control.kind == RANDOM and same_size and recipe.is_plain and column.random_is_worst and -lead > margin + TIE:
        return f"an untrained {recipe.arch} scores better than a trained one, so an SAE that finds nothing wins"
    return ""
