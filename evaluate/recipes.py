"""Recipes and results: what was measured, of which training, and which recipe is whose baseline."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evaluate.columns import Column
from evaluate.example import Example
from evaluate.statistics import Estimate, estimate

TRAINED, PRETRAINED, ORACLE = "trained", "pretrained", "oracle"
RANDOM, MATCHED, PERMUTED = "untrained", "random, L0 matched", "permuted decoder"
KINDS = (TRAINED, PRETRAINED, MATCHED, PERMUTED, RANDOM, ORACLE)  # in the order of the tables
NOISE, DROPOUT, RANDOM_TOKEN, SMALL = "noise", "dropout", "random token", "small dictionary"
CONTROLS = (NOISE, DROPOUT, RANDOM_TOKEN, SMALL)  # trained runs that stand beside the masked ones


@dataclass(frozen=True, kw_only=True, order=True)
class Recipe:
    """What seeds vary within. `bench` names the cache and hook point; values of different benches are not compared.

    kind: one of KINDS; a control that is the same for several architectures names them all ("batchtopk, matryoshka").
    control: one of CONTROLS for a trained run that is there to be compared with, else empty.
    settings: what else differs, such as "lr 0.001"; compared are recipes of equal settings.
    """

    bench: str
    arch: str
    k: int
    d_sae: int
    name: str
    kind: str = TRAINED
    is_plain: bool = False
    is_masked: bool = False
    control: str = ""
    settings: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The numbers of one dictionary.

    values: column -> value, NaN where it is not defined; `name@part` is a part of a column. profiles: name -> numbers
    that are drawn and not compared, such as a histogram. path: the run's folder, None for a control.
    """

    run: str
    recipe: Recipe
    seed: int
    values: Mapping[str, float]
    profiles: Mapping[str, list[float]] = field(default_factory=dict)
    example: Example | None = None
    path: Path | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Everything that was measured: what the report is made of.

    missing: sentences on what could not be measured, and why. left_out: name of a run -> why it could not.
    cautions: sentences on numbers that mean little here. order_varies: runs of other seeds saw the rows in another
    order.
    """

    results: list[Result] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    cautions: list[str] = field(default_factory=list)
    order_varies: bool = False


def by_recipe(results: Iterable[Result]) -> dict[Recipe, list[Result]]:
    """Recipe -> its results in order of seed; recipes sorted, controls last."""
    groups: dict[Recipe, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.recipe].append(result)
    order = sorted(groups, key=lambda recipe: (recipe.bench, KINDS.index(recipe.kind), _place(recipe)))
    return {recipe: sorted(groups[recipe], key=lambda result: (result.seed, result.run)) for recipe in order}


def _place(recipe: Recipe) -> tuple:
    return recipe.arch, recipe.k, recipe.settings, -recipe.d_sae, not recipe.is_plain, not recipe.is_masked, recipe.name


def baseline_of(recipe: Recipe, recipes: Iterable[Recipe]) -> Recipe | None:
    """What a recipe is compared with: plain training of the same kind, of equal size.

    A smaller plain dictionary is compared with the largest plain one.
    """
    plain = [other for other in recipes if other.is_plain and same_kind(other, recipe)]
    if not recipe.is_plain:
        plain = [other for other in plain if other.d_sae == recipe.d_sae]
    best = max(plain, key=lambda other: other.d_sae, default=None)
    return None if best == recipe else best


def noise_controls(recipe: Recipe, recipes: Iterable[Recipe]) -> list[Recipe]:
    """Corruptions that displace rows as much as a masked recipe does; their names say "(matched 0.5)"."""
    if not recipe.is_masked:
        return []
    fraction = recipe.name.partition(",")[0].removeprefix("masked ")
    same = [other for other in recipes if same_kind(other, recipe) and other.d_sae == recipe.d_sae]
    noise = [other for other in same if f" (matched {fraction})" in other.name.partition(",")[0]]
    return [other for other in noise if _target(other) == _target(recipe)]


def _target(recipe: Recipe) -> list[str]:
    """The part of a name that says what was reconstructed, if not the input itself: ["clean target"]."""
    return [part for part in recipe.name.split(", ") if part.endswith(" target")]


def same_kind(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes agree in all but the size, the seed and what was done to the rows."""
    return _kind(one) == _kind(other)


def _kind(recipe: Recipe) -> tuple[str, str, int, str]:
    return recipe.bench, recipe.arch, recipe.k, recipe.settings


def summaries(results: Iterable[Result]) -> dict[Recipe, dict[str, Estimate]]:
    """Recipe -> column -> estimate, for the columns that every seed of the recipe has."""
    tables: dict[Recipe, dict[str, Estimate]] = {}
    for recipe, group in by_recipe(results).items():
        columns = [name for name in group[0].values if all(name in result.values for result in group)]
        tables[recipe] = {name: estimate([result.values[name] for result in group]) for name in columns}
    return tables


def paired_values(
    group: Iterable[Result], baseline: Iterable[Result], name: str, column: Column | None = None
) -> np.ndarray:
    """A column's values of equal seeds, [n_pairs, 2], where both have a number."""
    values = np.array([*values_of_seeds(group, baseline, name, column).values()], dtype=float).reshape(-1, 2)
    return values[np.isfinite(values).all(axis=1)]


def values_of_seeds(
    group: Iterable[Result], baseline: Iterable[Result], name: str, column: Column | None = None
) -> dict[int, tuple[float, float]]:
    """Seed that both have -> its two values, NaN where there is no number.

    Where `column` has parts, both are means over the parts that count in both.
    """
    other = {result.seed: result.values for result in baseline}
    both = {result.seed: (result.values, other[result.seed]) for result in group if result.seed in other}
    if column is not None and column.parts:
        return {seed: _over_common_parts(one, another, column) for seed, (one, another) in both.items()}
    nan = float("nan")
    return {seed: (one.get(name, nan), another.get(name, nan)) for seed, (one, another) in both.items()}


def _over_common_parts(one: Mapping[str, float], other: Mapping[str, float], column: Column) -> tuple[float, float]:
    """Means over the parts that count in both dictionaries; NaN if these are fewer than half of all."""
    start, counted = f"{column.parts}@", f"{column.counted}@"
    parts = [name for name in one if name.startswith(start) and name in other]
    flags = {name: name.replace(start, counted) for name in parts}
    common = [name for name in parts if one.get(flags[name]) == other.get(flags[name]) == 1]
    if not parts or 2 * len(common) < len(parts):
        return float("nan"), float("nan")
    return float(np.mean([one[name] for name in common])), float(np.mean([other[name] for name in common]))
