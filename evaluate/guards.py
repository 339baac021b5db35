"""Guards against traps that once made false results: columns that rank a control wrongly, and sentences of caution."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evaluate.columns import Column, column_of
from evaluate.recipes import (
    CONTROLS,
    DROPOUT,
    MATCHED,
    NOISE,
    ORACLE,
    PERMUTED,
    RANDOM_TOKEN,
    SMALL,
    TRAINED,
    Recipe,
    Result,
    baseline_of,
    by_recipe,
    paired_values,
    same_kind,
    summaries,
)
from evaluate.statistics import Estimate, estimate, paired_test

_Pair = tuple[Recipe, Recipe]  # a recipe and its baseline
_Tables = Mapping[Recipe, Mapping[str, Estimate]]
TIE = 1e-9
FEWEST_SEEDS = 3
FEWER_LIVE = 0.1  # a tenth fewer live latents is a smaller dictionary
RAW_L0_TOLERANCE = 0.02
_WITHOUT = {  # what is missing -> what to train
    NOISE: "no noise run (--corrupt gaussian --match-strength)",
    DROPOUT: "no dropout run (--corrupt dropout --match-strength)",
    RANDOM_TOKEN: "no random-token run (harvest with --random-prob, train with --masked-variant random)",
    SMALL: "no smaller dictionary (a second --d-sae)",
}


def unreliable(results: Sequence[Result], columns: Mapping[str, Column]) -> dict[str, str]:
    """Columns that rank a control wrongly, and how: column -> sentence.

    A column is unreliable here if a random SAE of matched L0 beats the plainly trained ones it belongs to, or if a
    trained SAE beats the oracle, by more than two standard errors of the trained mean (of any amount for a single
    seed). Controls are compared on the seeds that both have, in columns that all seeds of both have.
    """
    return _faults(results, columns, (ORACLE, MATCHED))


def _faults(results: Sequence[Result], columns: Mapping[str, Column], kinds: Sequence[str]) -> dict[str, str]:
    """Columns in which controls of these kinds are ranked wrongly."""
    groups, found = by_recipe(results), {}
    for recipe, group in groups.items():
        for control, others in groups.items():
            if recipe.kind != TRAINED or control.kind not in kinds or control.bench != recipe.bench:
                continue
            for name in set.intersection(*(set(result.values) for result in (*group, *others))):
                column = column_of(columns, name)
                if column.better and "@" not in name and (fault := _fault(name, column, group, others)):
                    found.setdefault(name, fault)
    return dict(sorted(found.items()))


def _fault(name: str, column: Column, group: Sequence[Result], others: Sequence[Result]) -> str:
    """What is wrong with how a column ranks a trained recipe and a control; empty if nothing."""
    recipe, control = group[0].recipe, others[0].recipe
    error = estimate([result.values.get(name, math.nan) for result in group]).error
    margin = TIE + (0.0 if math.isnan(error) else 2 * error)
    sign = 1.0 if column.better == "higher" else -1.0
    if control.kind == ORACLE:
        trained = estimate([result.values.get(name, math.nan) for result in group]).mean
        if column.oracle_is_best and sign * (trained - others[0].values[name]) > margin:
            return f"{recipe.arch} {recipe.name} scores better than the oracle, which knows the answers"
        return ""
    same_size = (control.k, control.settings, control.d_sae) == (recipe.k, recipe.settings, recipe.d_sae)
    pairs = paired_values(group, others, name)
    if not (recipe.is_plain and same_size and recipe.arch in control.arch.split(", ") and len(pairs)):
        return ""
    if not column.random_is_worst or sign * float((pairs[:, 1] - pairs[:, 0]).mean()) <= margin:
        return ""
    return f"a random {recipe.arch} SAE of equal L0 scores better than a trained one, so one that finds nothing wins"


def cautions(results: Sequence[Result], columns: Mapping[str, Column]) -> list[str]:
    """Sentences on what the numbers cannot show, each computed from the numbers."""
    groups = {recipe: group for recipe, group in by_recipe(results).items() if recipe.kind == TRAINED}
    tables = summaries([result for group in groups.values() for result in group])
    baselines = {recipe: baseline_of(recipe, groups) for recipe in groups}
    pairs = [(recipe, baseline) for recipe, baseline in baselines.items() if baseline is not None]
    return [
        *_few_seeds(groups),
        *_missing_controls(groups),
        *_shrunken_drops(pairs, groups),
        *_fewer_live(pairs, tables),
        *_raw_l0(pairs, tables),
        *_shuffled(results, columns),
    ]


def _shuffled(results: Sequence[Result], columns: Mapping[str, Column]) -> Iterator[str]:
    """Columns in which a trained SAE is beaten by itself with the rows of its decoder shuffled."""
    if found := _faults(results, columns, (PERMUTED,)):
        names = sorted(column_of(columns, name).short or name for name in found)
        yield (
            f"an SAE with its decoder rows shuffled does better in {', '.join(names)}: what the shuffle breaks counts "
            "as not absorbed, so these say something only of SAEs that reconstruct well"
        )


def _named(recipe: Recipe) -> str:
    words = [recipe.arch, recipe.name, f"(k {recipe.k}, {recipe.d_sae} latents)", recipe.settings]
    return " ".join(filter(None, words))


def _few_seeds(groups: Mapping[Recipe, Sequence[Result]]) -> Iterator[str]:
    few: dict[int, list[str]] = {}
    for recipe, group in groups.items():
        if len(group) < FEWEST_SEEDS:
            few.setdefault(len(group), []).append(_named(recipe))
    for n, names in sorted(few.items()):
        yield (
            f"{n} seed{'s' * (n > 1)} of {'; '.join(names)}: fewer than {FEWEST_SEEDS} say little about chance, and at "
            "one seed nearly every recipe once seemed to help; train more with --seed"
        )


def _missing_controls(groups: Mapping[Recipe, Sequence[Result]]) -> Iterator[str]:
    """For the masked recipes of each kind, the controls that do not stand beside them."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    kinds = {(r.bench, r.arch, r.k, r.settings): r for r in groups if r.is_masked}
    for masked in kinds.values():
        here = {recipe.control for recipe in groups if same_kind(recipe, masked)}
        absent = tuple(control for control in CONTROLS if control not in here)
        who = f"{masked.arch} k {masked.k} {masked.settings}".strip()
        lacking.setdefault(absent, []).append(who)
    for absent, names in lacking.items():
        if absent:
            yield (
                f"beside the masked runs of {', '.join(names)} stand {', '.join(_WITHOUT[name] for name in absent)}; "
                "without these what masking does cannot be told from what any noise or a smaller dictionary does"
            )


def _shrunken_drops(pairs: Sequence[_Pair], groups: Mapping[Recipe, Sequence[Result]]) -> Iterator[str]:
    """Drops under shift that are smaller while the score without the shift is lower too."""
    found: dict[tuple[str, str], list[str]] = {}
    for recipe, baseline in pairs:
        for name in groups[recipe][0].values:
            if not (match := re.fullmatch(r"ood_drop_(\d+)", name)):
                continue
            score = f"sae_top_{match[1]}_test_auc"
            drop, usual = (paired_values(groups[recipe], groups[baseline], column) for column in (name, score))
            if len(drop) and len(usual) and _is_lower(drop) and _is_lower(usual):
                text = f"{_named(recipe)} ({_minus(drop):+.3g}, and {_minus(usual):+.3g} on the usual text)"
                found.setdefault((name, score), []).append(text)
    for (name, score), recipes in found.items():
        yield (
            f"{name} is lower than without masking or noise, and so is {score}, of {'; '.join(recipes)}: the drop "
            "shrank at least in part because the score on the usual text fell"
        )


def _minus(pairs: np.ndarray) -> float:
    return float((pairs[:, 0] - pairs[:, 1]).mean())


def _is_lower(pairs: np.ndarray) -> bool:
    """Whether the first of each pair is lower by more than one standard error (by any amount for a single seed)."""
    test = paired_test((pairs[:, 0] - pairs[:, 1]).tolist())
    return test.mean < -(TIE if math.isnan(test.error) else max(test.error, TIE))


def _live(recipe: Recipe, tables: _Tables) -> float:
    dead = tables[recipe].get("dead_latents")
    return math.nan if dead is None else recipe.d_sae - dead.mean


def _fewer_live(pairs: Sequence[_Pair], tables: _Tables) -> Iterator[str]:
    """Dead latents that make it a smaller dictionary; a dictionary that is smaller on purpose says so itself."""
    found: dict[str, list[str]] = {}
    for recipe, baseline in pairs:
        live, before = _live(recipe, tables), _live(baseline, tables)
        if recipe.control == SMALL or not live < (1 - FEWER_LIVE) * before:
            continue
        smaller = [other for other in tables if same_kind(other, recipe) and other.control == SMALL]
        nearest = min(smaller, key=lambda other: abs(_live(other, tables) - live), default=None)
        advice = (
            "no smaller dictionary stands in the table; train one with such a --d-sae"
            if nearest is None
            else f"compare with {_named(nearest)}, which has {_live(nearest, tables):.0f}"
        )
        found.setdefault(advice, []).append(f"{_named(recipe)} has {live:.0f} ({1 - live / before:.0%} fewer)")
    for advice, recipes in found.items():
        yield (
            f"fewer live latents than the unmasked runs: {'; '.join(recipes)}; a smaller dictionary alone changes "
            f"these numbers, so {advice}"
        )


def _raw_l0(pairs: Sequence[_Pair], tables: _Tables) -> Iterator[str]:
    more = []
    for recipe, baseline in pairs:
        raw, before = tables[recipe].get("l0_raw"), tables[baseline].get("l0_raw")
        if raw is None or before is None or not before.mean > 0:
            continue
        if (change := raw.mean / before.mean - 1) > RAW_L0_TOLERANCE:
            more.append(f"{_named(recipe)} {change:.0%}")
    if more:
        yield (
            "at nominal k these would have had more latents on per clean token than their baselines: "
            f"{'; '.join(more)}; here both are measured at thresholds of equal L0"
        )
