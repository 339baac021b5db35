"""Comparing recipes: pairing by seed, intervals, corrections, verdicts, and the seeds that an effect would need."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compare_fixtures import COLUMNS, SCORE, recipe, results
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluate.columns import Column
from evaluate.compare import CLAIM, OTHER, compare, differences
from evaluate.recipes import (
    MATCHED,
    ORACLE,
    PERMUTED,
    RANDOM,
    Result,
    baseline_of,
    by_recipe,
    summaries,
)
from evaluate.statistics import estimate, holm, paired_test, power, seeds_needed, smallest_effect

numbers = st.lists(st.floats(-5, 5).map(lambda value: round(value, 3)), min_size=3, max_size=6)


@given(numbers, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_differences_are_the_paired_t_test(base, seed):
    other = [
        value + shift for value, shift in zip(base, np.random.default_rng(seed).normal(size=len(base)), strict=True)
    ]
    (found,) = differences(results(recipe(), base) + results(recipe("masked 0.5"), other), COLUMNS)
    reference = stats.ttest_rel(other, base)
    interval = reference.confidence_interval(0.95)
    assert found.mean == pytest.approx(float(np.mean(other) - np.mean(base)), abs=1e-9)
    assert found.error == pytest.approx(float(stats.sem(np.subtract(other, base))), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((float(interval.low), float(interval.high)), rel=1e-6, abs=1e-9)
    assert found.p == found.p_holm == pytest.approx(float(reference.pvalue), rel=1e-5)
    assert (found.verdict == "no difference seen") == (found.low <= 0 <= found.high)


def test_pairs_are_of_equal_seeds_whatever_the_order():
    base = results(recipe(), [1.0, 2.0, 3.0])[::-1]
    other = results(recipe("masked 0.5"), [2.5, 3.5, 9.0], first_seed=1)  # seeds 1, 2, 3: two pairs
    (found,) = differences([*other, *base], COLUMNS)
    assert (found.n, found.mean) == (2, 0.5)


def test_a_seed_whose_number_is_not_defined_is_no_pair():
    base = results(recipe(), [1.0, math.nan, 3.0])
    (found,) = differences(base + results(recipe("masked 0.5"), [2.0, 3.0, 5.0]), COLUMNS)
    assert (found.n, found.n_seeds, found.mean) == (2, 3, 1.5)
    assert found.verdict == "numbers missing: no verdict"
    assert found.n_family == 0


def test_two_seeds_have_an_interval_and_no_verdict():
    (found,) = differences(results(recipe(), [1.0, 1.0]) + results(recipe("masked 0.5"), [9.0, 9.001]), COLUMNS)
    assert found.low > 7
    assert (found.verdict, found.n_family) == ("two seeds: no verdict", 0)


def test_only_masked_against_unmasked_is_a_claim():
    columns = {"score": replace(SCORE, claim=True)}
    noise = recipe("gaussian 0.45 (matched 0.5)")
    rows = results(recipe(), [1.0, 2.0, 4.0]) + results(noise, [2.0, 3.1, 4.0])
    found = differences(rows + results(recipe("masked 0.5"), [3.0, 4.5, 5.0]), columns)
    families = {(d.recipe.is_masked, d.baseline.is_plain): (d.family, d.n_family) for d in found}
    assert families == {(True, True): (CLAIM, 1), (True, False): (OTHER, 2), (False, True): (OTHER, 2)}


PARTED = replace(SCORE, parts="rate", counted="has")


def with_parts(of: Any, rates: list[dict[str, float | None]]) -> list[Result]:
    """One result a seed, of rates by part; None for a part that does not count."""
    return [
        Result(
            run="",
            recipe=of,
            seed=seed,
            values={
                "score": sum(rate for rate in parts.values() if rate is not None),
                **{f"rate@{part}": rate or 0.0 for part, rate in parts.items()},
                **{f"has@{part}": float(rate is not None) for part, rate in parts.items()},
            },
        )
        for seed, parts in enumerate(rates)
    ]


def test_pairs_are_compared_over_the_parts_that_both_have():
    base = with_parts(recipe(), [{"a": 0.2, "b": 0.8, "c": 0.4}] * 3)
    other = with_parts(recipe("masked 0.5"), [{"a": 0.3, "b": None, "c": 0.5}] * 3)
    (found,) = differences(base + other, {"score": PARTED})
    assert found.mean == pytest.approx(0.1)  # and not lower for having lost b
    few = with_parts(recipe("masked 0.5"), [{"a": 0.3, "b": None, "c": None}] * 3)
    assert differences(base + few, {"score": PARTED}) == []


def kinds(shifts: dict[tuple[str, int], float], n_seeds: int = 4) -> list[Result]:
    rows, rng = [], np.random.default_rng(3)
    for (arch, k), shift in shifts.items():
        base = rng.normal(size=n_seeds)
        rows += results(recipe(arch=arch, k=k), base.tolist())
        rows += results(recipe("masked 0.5", arch=arch, k=k), (base + shift + 0.3 * rng.normal(size=n_seeds)).tolist())
    return rows


def test_pooled_differences_are_means_over_kinds_seed_by_seed():
    shifts = {("batchtopk", 6): 1.0, ("batchtopk", 12): 0.5, ("jumprelu", 6): 0.2}
    columns = {"score": replace(SCORE, claim=True)}
    rows = kinds(shifts)
    found = compare(rows, columns)
    (together,) = found.pooled
    by_seed = {seed: [] for seed in range(4)}
    groups = by_recipe(rows)
    for arch, k in shifts:
        for one, other in zip(
            groups[recipe("masked 0.5", arch=arch, k=k)], groups[recipe(arch=arch, k=k)], strict=True
        ):
            by_seed[one.seed].append(one.values["score"] - other.values["score"])
    test = stats.ttest_1samp([np.mean(values) for values in by_seed.values()], 0)
    assert together.p == pytest.approx(float(test.pvalue))
    assert (together.n, together.n_pooled, together.n_family, together.recipe.arch) == (4, 3, 1, "all")
    assert found.families[together.family] == 1
    assert compare(kinds({("batchtopk", 6): 1.0}), columns).pooled == []


def test_a_kind_that_lacks_a_seed_or_the_matched_l0_is_not_pooled():
    rows = kinds({("batchtopk", 6): 1.0, ("batchtopk", 12): 0.5})
    lame = [replace(row, values={"score": math.nan}) if row.recipe.k == 12 and row.seed == 2 else row for row in rows]
    assert compare(lame, COLUMNS).pooled == []
    apart = [
        replace(row, values={**row.values, "l0": 6.0 + row.recipe.is_masked * (row.recipe.k == 12)}) for row in rows
    ]
    assert compare(apart, COLUMNS).pooled == []


def test_one_seed_has_no_interval_and_no_verdict():
    (found,) = differences(results(recipe(), [1.0]) + results(recipe("masked 0.5"), [2.0]), COLUMNS)
    assert all(map(math.isnan, (found.low, found.high, found.error, found.p, found.p_holm)))
    assert found.verdict == "one seed: no verdict"
    assert (found.n_family, found.seeds_needed) == (0, None)


def test_equal_values_everywhere_are_no_difference():
    same = [1.0, 2.0, 4.0]
    (found,) = differences(results(recipe(), same) + results(recipe("masked 0.5"), same), COLUMNS)
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)
    assert found.verdict == "no difference seen"
    assert found.seeds_needed is None


def test_the_baseline_is_plain_training_with_the_largest_dictionary():
    recipes = [recipe(), recipe(d_sae=128), recipe("masked 0.5"), recipe("masked 0.5", k=12), recipe(arch="topk")]
    assert baseline_of(recipes[2], recipes) == recipes[0]
    assert baseline_of(recipes[1], recipes) == recipes[0]
    assert baseline_of(recipes[0], recipes) is None
    assert baseline_of(recipes[3], recipes) is None
    assert baseline_of(recipe("masked 0.5", bench="other"), recipes) is None


def test_controls_are_not_compared_with_anything():
    trained = results(recipe(), [1.0, 2.0])
    controls = [row for kind in (ORACLE, RANDOM, MATCHED, PERMUTED) for row in results(recipe(kind, kind=kind), [9.0])]
    assert differences(trained + controls, COLUMNS) == []
    order = [of.kind for of in by_recipe(controls + trained)]
    assert order == ["trained", MATCHED, PERMUTED, RANDOM, ORACLE]


def two_arms(n_columns: int, n_seeds: int = 4, effect: float = 5.0) -> tuple[list[Result], dict[str, Column]]:
    """Noise in every column but the last, which is clearly higher in the second arm."""
    rng = np.random.default_rng(6)
    names = [f"c{i}" for i in range(n_columns)]
    rows = []
    for seed in range(n_seeds):
        base = dict(zip(names, rng.normal(size=n_columns), strict=True))
        other = {name: value + rng.normal() for name, value in base.items()}
        other[names[-1]] = base[names[-1]] + effect + 0.001 * seed
        rows += [Result(run="", recipe=recipe(), seed=seed, values=base)]
        rows += [Result(run="", recipe=recipe("masked 0.5"), seed=seed, values=other)]
    return rows, dict.fromkeys(names, SCORE)


def test_only_what_survives_holm_is_called_a_difference():
    rows, columns = two_arms(21)
    found = differences(rows, columns)
    assert [d.column for d in found if d.verdict != "no difference seen"] == ["c20"]
    assert {d.n_family for d in found} == {21}
    assert sum(d.p < 0.05 for d in found) > 1  # alone, noise would have passed for more
    adjusted = holm([d.p for d in found])
    assert [d.p_holm for d in found] == adjusted


def test_claims_are_corrected_for_their_own_number():
    rows, columns = two_arms(6)
    columns["c0"] = replace(SCORE, claim=True, short="")
    found = compare(rows, columns)
    assert found.families == {CLAIM: 1, OTHER: 5}
    by_column = {d.column: d for d in found.differences}
    assert (by_column["c0"].family, by_column["c0"].n_family, by_column["c5"].n_family) == (CLAIM, 1, 5)
    assert by_column["c0"].p_holm == by_column["c0"].p


def test_columns_without_rank_or_of_dependent_seeds_are_summarised_and_not_tested():
    rows, columns = two_arms(3)
    columns |= {"c0": replace(SCORE, paired=False), "c1": replace(SCORE, better="")}
    found = compare(rows, columns)
    assert [d.column for d in found.differences] == ["c2"]
    assert {"c0", "c1", "c2"} <= found.tables[recipe()].keys()


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_holm_is_the_step_down_by_definition(p):
    """Adjusted p is at most alpha exactly where Holm's procedure at alpha rejects."""
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.2):
        rejected, order = set(), sorted(range(len(p)), key=lambda i: p[i])
        for rank, i in enumerate(order):
            if p[i] > alpha / (len(p) - rank):
                break
            rejected.add(i)
        clear = [i for i in range(len(p)) if abs(adjusted[i] - alpha) > 1e-12]
        assert all((adjusted[i] <= alpha) == (i in rejected) for i in clear)


def test_estimates_are_mean_and_standard_error():
    found = estimate([1.0, 2.0, 6.0])
    assert (found.mean, found.n) == (3.0, 3)
    assert found.error == pytest.approx(float(stats.sem([1.0, 2.0, 6.0])))


@pytest.mark.parametrize(  # two-sided paired t-test, 5 %, power 80 %: Cohen 1988 and G*Power 3.1
    ("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)]
)
def test_seeds_needed_are_those_of_published_tables(effect, n):
    assert seeds_needed(effect, 1.0, 1) == n
    assert seeds_needed(-effect, 1.0, 1) == n
    assert power(n, effect, 0.05) >= 0.8 > power(n - 1, effect, 0.05)


def test_power_is_what_a_simulation_finds():
    rng = np.random.default_rng(0)
    for n, effect, level in ((5, 1.5, 0.05), (8, 1.6, 0.01), (20, 0.7, 0.05 / 6)):
        draws = rng.normal(effect, 1, (10_000, n))
        statistic = draws.mean(1) / (draws.std(1, ddof=1) / np.sqrt(n))
        seen = float((np.abs(statistic) > stats.t.isf(level / 2, n - 1)).mean())
        assert power(n, effect, level) == pytest.approx(seen, abs=0.015)


def test_seeds_needed_grow_with_the_family_and_end_somewhere():
    few, many = seeds_needed(1.0, 1.0, 10), seeds_needed(1.0, 1.0, 100)
    assert few is not None
    assert many is not None
    assert 10 < few < many
    assert seeds_needed(1e-3, 1.0, 1) is None
    assert seeds_needed(0.0, 1.0, 1) is None
    assert seeds_needed(1.0, math.nan, 1) is None
    assert seeds_needed(1.0, 0.0, 50) == 2
    assert seeds_needed(1e6, 1.0, 1) == 2


def test_the_smallest_effect_is_the_one_its_seeds_are_needed_for():
    for n, n_family in ((3, 1), (5, 12), (12, 100)):
        effect = smallest_effect(n, n_family)
        assert power(n, effect, 0.05 / n_family) == pytest.approx(0.8, abs=1e-6)
        assert seeds_needed(effect * (1 + 1e-6), 1.0, n_family) == n
    assert math.isnan(smallest_effect(1, 1))


def test_a_paired_test_of_one_pair_has_only_a_mean():
    found = paired_test([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.p)


@pytest.mark.parametrize(("l0", "is_matched"), [(6.1, True), (6.3, False), (5.7, False)])
def test_an_l0_that_is_not_matched_gives_no_verdict_and_is_no_comparison(l0, is_matched):
    rows = results(recipe(), [1.0, 1.1, 1.2], l0=6.0)
    rows += results(recipe("masked 0.5"), [2.0, 2.1, 2.3], l0=l0)
    (found,) = differences(rows, COLUMNS)
    assert found.l0_change == pytest.approx(l0 / 6 - 1)
    assert found.l0_matched == is_matched
    assert found.verdict == ("higher" if is_matched else "L0 not matched")
    assert found.n_family == int(is_matched)
    assert found.p < 0.05


def test_an_l0_that_nobody_measured_is_taken_for_matched():
    (unknown,) = differences(results(recipe(), [1.0]) + results(recipe("masked 0.5"), [2.0]), COLUMNS)
    assert unknown.l0_matched


def two_sizes() -> list[Result]:
    rows = []
    for d_sae in (512, 128):
        for shift, name in ((0.0, "unmasked"), (-0.1, "masked 0.25"), (-0.3, "masked 0.5")):
            rows += results(recipe(name, d_sae=d_sae), [d_sae + shift, d_sae + shift + 0.5, d_sae + shift + 1])
    return rows


def test_a_masked_recipe_is_compared_with_the_plain_one_of_its_size():
    """Two sizes and two fractions: the difference is that of masking, never of size."""
    found = {(d.recipe.name, d.recipe.d_sae): d for d in differences(two_sizes(), COLUMNS)}
    for d_sae in (512, 128):
        for name, shift in (("masked 0.25", -0.1), ("masked 0.5", -0.3)):
            difference = found[name, d_sae]
            assert difference.baseline == recipe(d_sae=d_sae)
            assert difference.mean == pytest.approx(shift)
    assert found["unmasked", 128].baseline == recipe(d_sae=512)
    assert len(found) == 5
    assert baseline_of(recipe("masked 0.5", d_sae=64), [recipe(), recipe(d_sae=128)]) is None


def test_masked_recipes_are_also_compared_with_noise_of_matched_strength():
    noise = recipe("gaussian 0.45 (matched 0.5)")
    others = [recipe("gaussian 0.2 (matched 0.25)"), replace(noise, d_sae=128), replace(noise, k=12)]
    rows = [row for other in others for row in results(other, [5.0, 6.0])]
    rows += results(recipe(), [1.0, 2.0]) + results(recipe("masked 0.5"), [3.0, 4.5]) + results(noise, [2.0, 3.0])
    found = [d for d in differences(rows, COLUMNS) if d.recipe.is_masked]
    assert [(d.baseline, d.mean) for d in found] == [(recipe(), 2.25), (noise, 1.25)]


def test_a_power_note_says_what_the_seeds_can_see_and_what_it_would_take():
    rows, columns = two_arms(4)
    (note,) = compare(rows, columns).power_notes.values()
    assert note.startswith("4 pairs of seeds, 1 of 4 differences seen; with 80% power at 0.05 over 4 comparisons")
    weak = next(d for d in differences(rows, columns) if d.column == "c0")
    assert f"{weak.seeds_needed:,} seeds" in note


def test_summaries_have_the_columns_that_every_seed_has():
    rows = [*results(recipe(), [1.0]), Result(run="", recipe=recipe(), seed=1, values={"score": 2.0, "other": 1.0})]
    assert summaries(rows)[recipe()].keys() == {"score"}
