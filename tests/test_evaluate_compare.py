"""Comparing recipes: pairing by seed, intervals, corrections, controls, and the words for them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluate import wording
from evaluate.columns import Column
from evaluate.compare import (
    ORACLE,
    RANDOM,
    Difference,
    Recipe,
    Result,
    baseline_of,
    by_recipe,
    differences,
    estimate,
    summaries,
    unreliable,
)

COLUMNS = {"score": Column(meaning="a score", better="higher", oracle_is_best=True, short="sc", terminal=True)}


def recipe(name: str = "unmasked", **facts: Any) -> Recipe:
    plain = Recipe(bench="b", arch="batchtopk", k=6, d_sae=512, name=name, is_plain=name == "unmasked")
    return replace(plain, is_masked=name.startswith("masked"), **facts)


def results(of: Recipe, values: list[float], column: str = "score", first_seed: int = 0) -> list[Result]:
    return [
        Result(run=f"{of.name}{i}", recipe=of, seed=first_seed + i, values={column: v}) for i, v in enumerate(values)
    ]


numbers = st.lists(st.floats(-5, 5).map(lambda value: round(value, 3)), min_size=2, max_size=6)


@given(numbers, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_differences_are_the_paired_t_test(base, seed):
    other = [
        value + shift for value, shift in zip(base, np.random.default_rng(seed).normal(size=len(base)), strict=True)
    ]
    (found,) = differences(results(recipe(), base) + results(recipe("masked 0.5"), other), ["score"])
    reference = stats.ttest_rel(other, base)
    interval = reference.confidence_interval(0.95)
    assert found.mean == pytest.approx(float(np.mean(other) - np.mean(base)), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((float(interval.low), float(interval.high)), rel=1e-6, abs=1e-9)
    assert found.p == pytest.approx(float(reference.pvalue), rel=1e-5)
    assert (found.verdict == "not distinguishable from 0") == (found.low <= 0 <= found.high)


def test_pairs_are_of_equal_seeds_whatever_the_order():
    base = results(recipe(), [1.0, 2.0, 3.0])[::-1]
    other = results(recipe("masked 0.5"), [2.5, 3.5, 9.0], first_seed=1)  # seeds 1, 2, 3: two pairs
    (found,) = differences([*other, *base], ["score"])
    assert (found.n, found.mean) == (2, 0.5)


def test_one_seed_has_no_interval_and_says_so():
    (found,) = differences(results(recipe(), [1.0]) + results(recipe("masked 0.5"), [2.0]), ["score"])
    assert math.isnan(found.low)
    assert found.verdict == "one seed: no interval"
    assert "one seed says nothing about chance" in wording.sentence([found_as(found, "explained_variance")])


def found_as(difference: Difference, column: str) -> Difference:
    return replace(difference, column=column)


def test_equal_values_everywhere_are_not_distinguishable_from_zero():
    (found,) = differences(results(recipe(), [1.0, 2.0]) + results(recipe("masked 0.5"), [1.0, 2.0]), ["score"])
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)
    assert found.verdict == "not distinguishable from 0"
    assert not found.holm


def test_the_baseline_is_plain_training_with_the_largest_dictionary():
    recipes = [recipe(), recipe(d_sae=128), recipe("masked 0.5"), recipe("masked 0.5", k=12), recipe(arch="topk")]
    assert baseline_of(recipes[2], recipes) == recipes[0]
    assert baseline_of(recipes[1], recipes) == recipes[0]
    assert baseline_of(recipes[0], recipes) is None
    assert baseline_of(recipes[3], recipes) is None
    assert baseline_of(recipe("masked 0.5", bench="other"), recipes) is None


def test_controls_are_not_compared_with_anything():
    trained = results(recipe(), [1.0, 2.0])
    controls = results(recipe(ORACLE, kind=ORACLE), [9.0]) + results(recipe(RANDOM, kind=RANDOM), [0.0])
    assert differences(trained + controls, ["score"]) == []
    assert next(iter(by_recipe(controls + trained))) == recipe()


def test_holm_is_stricter_than_each_interval_alone():
    """Twenty columns of noise and one clear effect: only the effect survives, whatever looks significant alone."""
    rng = np.random.default_rng(1)
    base = [{f"c{i}": float(value) for i, value in enumerate(rng.normal(size=21))} for _ in range(4)]
    other = [{name: value + rng.normal() for name, value in values.items()} for values in base]
    for seed, values in enumerate(other):
        values["c20"] = base[seed]["c20"] + 5 + 0.001 * seed
    rows = [Result(run="", recipe=recipe(), seed=i, values=values) for i, values in enumerate(base)]
    rows += [Result(run="", recipe=recipe("masked 0.5"), seed=i, values=values) for i, values in enumerate(other)]
    found = differences(rows, [f"c{i}" for i in range(21)])
    assert [d.column for d in found if d.holm] == ["c20"]
    assert "21 paired comparisons" in wording.multiplicity(found)
    assert "and 1 is significant after Holm" in wording.multiplicity(found)


def test_estimates_are_mean_and_standard_error():
    found = estimate([1.0, 2.0, 6.0])
    assert (found.mean, found.n) == (3.0, 3)
    assert found.error == pytest.approx(float(stats.sem([1.0, 2.0, 6.0])))
    assert math.isnan(estimate([1.0]).error)


def test_a_column_that_a_seed_lacks_is_left_out_of_the_summary():
    rows = results(recipe(), [1.0, 2.0])
    rows[1] = Result(run="x", recipe=recipe(), seed=1, values={})
    assert summaries(rows) == {recipe(): {}}


@pytest.mark.parametrize(
    ("oracle", "untrained", "fault"),
    [(1.0, 0.1, ""), (0.7, 0.1, "oracle"), (1.0, 0.9, "untrained"), (0.79, 0.1, ""), (1.0, 0.81, "")],
    ids=["sound", "beats the oracle", "beaten by an untrained one", "within two errors", "within two errors below"],
)
def test_a_column_that_ranks_a_control_wrongly_is_unreliable(oracle, untrained, fault):
    rows = results(recipe(), [0.78, 0.8, 0.82])  # mean 0.8, standard error 0.0115
    rows += results(recipe(ORACLE, kind=ORACLE, arch="", k=0), [oracle])
    rows += results(recipe(RANDOM, kind=RANDOM), [untrained])
    found = unreliable(rows, COLUMNS)
    assert (fault in found["score"]) if fault else found == {}


def test_an_untrained_sae_of_another_size_or_a_column_without_a_ranking_says_nothing():
    rows = results(recipe(), [0.8]) + results(recipe(RANDOM, kind=RANDOM, d_sae=128), [0.9])
    assert unreliable(rows, COLUMNS) == {}
    rows = results(recipe(), [0.8]) + results(recipe(RANDOM, kind=RANDOM), [0.9])
    assert unreliable(rows, COLUMNS)
    assert unreliable(rows, {"score": Column(meaning="an L0")}) == {}


def test_the_sentence_is_about_masking_and_the_first_measured_focus():
    rows = []
    for column, shift in (("explained_variance", -0.5), ("full_absorption_cross_token", -0.01)):
        rows += results(recipe(), [0.4, 0.5, 0.6], column) + results(recipe("gaussian 0.4"), [0.0, 0.1, 0.2], column)
        rows += results(recipe("masked 0.5"), [0.4 + shift, 0.52 + shift, 0.58 + shift], column)
    merged = [
        Result(
            run="",
            recipe=r,
            seed=s,
            values={k: v for x in rows if (x.recipe, x.seed) == (r, s) for k, v in x.values.items()},
        )
        for r in dict.fromkeys(x.recipe for x in rows)
        for s in range(3)
    ]
    text = wording.sentence(differences(merged, ["explained_variance", "full_absorption_cross_token"]))
    assert text.startswith(
        "Over 3 seeds, 'masked 0.5' changed cross-token absorption of batchtopk by −0.010 (95 % interval"
    )
    assert text.endswith(": not distinguishable from 0).")
    assert "gaussian" not in text
    assert wording.sentence([]).startswith("Nothing here says what masking does")


def test_labels_name_only_what_differs():
    recipes = [recipe(), recipe(d_sae=128), recipe("masked 0.5", k=12)]
    assert wording.labels(recipes[:1]) == {recipes[0]: "batchtopk unmasked"}
    assert list(wording.labels(recipes).values()) == [
        "batchtopk unmasked k 6",
        "batchtopk unmasked k 6 128 latents",
        "batchtopk masked 0.5 k 12",
    ]
    both = [recipe(), recipe(bench="other")]
    assert list(wording.labels(both).values()) == ["batchtopk unmasked (b)", "batchtopk unmasked (other)"]


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.12345, False, "0.123"),
        (-0.5, False, "−0.500"),
        (0.5, True, "+0.500"),
        (-0.0001, True, "0.000"),
        (123.4, False, "123.4"),
    ],
)
def test_numbers_are_short_and_honest_about_zero(value, signed, text):
    assert wording.number(value, signed=signed) == text
    assert wording.number(float("nan")) == "–"


def test_an_error_is_as_precise_as_its_mean():
    assert wording.error_of(estimate([100.0, 104.0, 96.0])) == "2.3"
    assert wording.error_of(estimate([1.0])) == ""


def test_the_terminal_table_has_a_line_per_recipe_and_lines_up():
    rows = results(recipe(), [0.4, 0.5, 0.6]) + results(recipe(ORACLE, kind=ORACLE, arch=""), [1.0])
    head, *lines = wording.terminal_table(summaries(rows), COLUMNS).split("\n")
    assert head.split() == ["seeds", "sc"]
    assert lines[0].split() == ["batchtopk", "unmasked", "3", ".500±.058"]
    assert lines[1].split() == ["oracle", "1", "1.00"]
    assert len(head) == len(lines[0]) == len(lines[1])


def two_sizes() -> list[Result]:
    rows = []
    for d_sae in (512, 128):
        for shift, name in ((0.0, "unmasked"), (-0.1, "masked 0.25"), (-0.3, "masked 0.5")):
            rows += results(recipe(name, d_sae=d_sae), [d_sae + shift, d_sae + shift + 0.5, d_sae + shift + 1])
    return rows


def test_a_masked_recipe_is_compared_with_the_plain_one_of_its_size():
    """Two sizes and two fractions: the difference is that of masking, never of size."""
    found = {(d.recipe.name, d.recipe.d_sae): d for d in differences(two_sizes(), ["score"])}
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
    found = [d for d in differences(rows, ["score"]) if d.recipe.is_masked]
    assert [(d.baseline, d.mean) for d in found] == [(recipe(), 2.25), (noise, 1.25)]


@pytest.mark.parametrize(("l0", "is_matched"), [(6.1, True), (6.3, False), (5.7, False)])
def test_an_l0_that_is_not_matched_is_noticed(l0, is_matched):
    rows = [Result(run="", recipe=recipe(), seed=0, values={"score": 1.0, "l0": 6.0})]
    rows += [Result(run="", recipe=recipe("masked 0.5"), seed=0, values={"score": 2.0, "l0": l0})]
    (found,) = differences(rows, ["score"])
    assert found.l0_change == pytest.approx(l0 / 6 - 1)
    assert found.l0_is_matched == is_matched
    (unknown,) = differences(results(recipe(), [1.0]) + results(recipe("masked 0.5"), [2.0]), ["score"])
    assert unknown.l0_is_matched


def test_one_untrained_sae_may_stand_for_several_architectures():
    rows = results(recipe(), [0.8]) + results(recipe(RANDOM, kind=RANDOM, arch="topk, batchtopk"), [0.9])
    assert "untrained batchtopk" in unreliable(rows, COLUMNS)["score"]
    rows = results(recipe(), [0.8]) + results(recipe(RANDOM, kind=RANDOM, arch="topk, matryoshka"), [0.9])
    assert unreliable(rows, COLUMNS) == {}


def test_the_verdict_names_noise_families_sizes_faults_and_an_l0_that_is_not_matched():
    noise = recipe("gaussian 0.45 (matched 0.5)")
    columns = [f"full_absorption_{family}" for family in ("cross_token", "same_token", "two_token")]
    rows = []
    for of, shift in ((recipe(), 0.0), (recipe("masked 0.5"), -0.3), (noise, -0.2)):
        for seed in range(3):
            values = dict.fromkeys(columns, 0.8 + shift + 0.1 * seed) | {"l0": 6.0 if of == recipe() else 6.6}
            rows.append(Result(run="", recipe=of, seed=seed, values=values))
    rows += [replace(row, recipe=replace(row.recipe, d_sae=128)) for row in rows if row.recipe != noise]
    text = wording.sentence(differences(rows, columns), {columns[0]: "a control wins"})
    assert "of batchtopk 512 latents by −0.300" in text
    assert "of batchtopk 128 latents by −0.300" in text
    assert "L0 not matched, +10 %" in text
    assert "Noise of matched strength ('gaussian 0.45 (matched 0.5)') changed it of batchtopk by −0.200" in text
    assert "'masked 0.5' minus noise: batchtopk −0.100 (95 % interval" in text
    assert "ame-token absorption: batchtopk 512 latents −0.300 (lower)" in text
    assert "two-token absorption: " in text
    assert text.endswith("Cross-token absorption is unreliable alone here: a control wins.")
