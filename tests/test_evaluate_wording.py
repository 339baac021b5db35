"""The words: numbers, the sentence of the verdict, and the terminal's table."""

import math
from dataclasses import replace

import pytest
from page_fixtures import COLUMNS, EIGHT, compared, planted, recipe

from evaluate import wording
from evaluate.compare import (
    CLAIM,
    HIGHER,
    LOWER,
    NONE_SEEN,
    NOT_MATCHED,
    OTHER,
    TWO_SEEDS,
    Comparison,
    Difference,
    is_claim,
)
from evaluate.recipes import NOISE
from evaluate.statistics import Estimate

MASKED, PLAIN = recipe("masked 0.5"), recipe("unmasked")
NOISY = recipe("gaussian (matched 0.5)")


def difference(column: str, verdict: str, who=MASKED, baseline=PLAIN, n: int = 5, mean: float = 0.1) -> Difference:
    """A difference with that verdict; its interval is mean ± 0.05."""
    size = -mean if verdict == LOWER else mean
    is_tested = n > 1 and verdict not in (NOT_MATCHED, TWO_SEEDS)
    found = Difference(
        recipe=who,
        baseline=baseline,
        column=column,
        mean=size,
        error=0.01 if n > 1 else math.nan,
        low=size - 0.05 if n > 1 else math.nan,
        high=size + 0.05 if n > 1 else math.nan,
        n=n,
        p=0.01 if n > 1 else math.nan,
        family=CLAIM if is_claim(COLUMNS[column], who, baseline) else OTHER,
        p_holm=(0.5 if verdict == NONE_SEEN else 0.01) if is_tested else math.nan,
        n_family=10 if is_tested else 0,
        l0_change=0.2 if verdict == NOT_MATCHED else 0.0,
    )
    assert found.verdict == verdict or n == 1
    return found


def comparison(*differences: Difference, **facts) -> Comparison:
    return Comparison(differences=list(differences), **facts)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (-0.5, "−0.500"), (-0.0001, "0.000"), (12.345, "12.3"), (math.nan, "–"), (math.inf, "–")],
)
def test_a_number_has_three_decimals_or_one(value, text):
    assert wording.number(value) == text


def test_a_signed_number_says_its_sign_and_zero_has_none():
    assert [wording.number(value, signed=True) for value in (0.1, -0.1, 0.0)] == ["+0.100", "−0.100", "0.000"]


def test_an_error_is_as_precise_as_its_mean():
    assert wording.error_of(Estimate(mean=20.0, error=0.123, n=3)) == "0.1"
    assert wording.error_of(Estimate(mean=0.2, error=0.123, n=3)) == "0.123"
    assert wording.error_of(Estimate(mean=0.2, error=math.nan, n=1)) == ""


def test_labels_name_only_what_differs():
    assert set(wording.labels([PLAIN, MASKED]).values()) == {"batchtopk unmasked", "batchtopk masked 0.5"}
    assert wording.labels([PLAIN, recipe("unmasked", k=9)])[PLAIN] == "batchtopk unmasked k 6"
    assert wording.labels([PLAIN, recipe("small")])[recipe("small")] == "batchtopk unmasked 220 latents"
    other = replace(PLAIN, bench="another")
    assert wording.labels([PLAIN, other])[other] == "batchtopk unmasked (another)"


def test_words_are_joined_as_one_says_them():
    assert [wording.joined(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_the_sentence_counts_each_claim():
    said = wording.sentence(
        comparison(
            difference("full_absorption_same_token", LOWER),
            difference("full_absorption_cross_token", HIGHER),
            difference("full_absorption_two_token", NONE_SEEN),
            difference("sae_top_1_test_auc", NONE_SEEN),
            difference("ood_gap_to_dense_16", LOWER),
            difference("explained_variance", LOWER),
        ),
        COLUMNS,
    )
    assert said == (
        "Over 5 seeds at matched L0, masking lowered absorption in 1 of 3 comparisons with unmasked training "
        "(raised in 1), narrowed the OOD gap in 1 of 1 and lowered explained variance in 1 of 1; "
        "no difference seen in probing AUC (0 of 1, blind below 0.071)."
    )
    assert len(said.split()) <= 50


def test_the_sentence_says_where_nothing_is_seen_at_all():
    said = wording.sentence(comparison(difference("sae_top_1_test_auc", NONE_SEEN)), COLUMNS)
    assert said == (
        "Over 5 seeds at matched L0, no difference is seen between masked and unmasked training in "
        "probing AUC (0 of 1, blind below 0.071)."
    )


def test_the_sentence_of_the_whole_grid_is_one_and_short():
    said = wording.sentence(compared(planted(EIGHT, ("batchtopk", "topk"), (3, 6), 3)), COLUMNS)
    assert len(said.split()) <= 60
    assert said.count(". ") == 0


def test_noise_and_other_columns_are_not_in_the_sentence():
    noise = difference("explained_variance", LOWER, NOISY)
    against = difference("full_absorption_cross_token", HIGHER, MASKED, NOISY)
    assert NOISY.control == NOISE
    assert "Nothing here says" in wording.sentence(comparison(noise, against), COLUMNS)
    assert "Nothing here says" in wording.sentence(comparison(difference("mcc", LOWER)), COLUMNS)


def test_one_seed_and_unmatched_l0_give_no_verdict():
    one = comparison(difference("explained_variance", LOWER, n=1))
    assert wording.sentence(one, COLUMNS).startswith(
        "No verdict on masking: masked and unmasked training share one seed"
    )
    two = wording.sentence(comparison(difference("explained_variance", TWO_SEEDS, n=2)), COLUMNS)
    assert two == (
        "No verdict on masking: masked and unmasked training share two seeds, which say too little: "
        "an interval takes three."
    )
    apart = comparison(difference("explained_variance", NOT_MATCHED))
    assert wording.sentence(apart, COLUMNS).startswith("No verdict on masking: no masked run has the L0")


def test_only_what_was_tested_is_counted():
    said = wording.sentence(
        comparison(
            difference("explained_variance", LOWER),
            difference("explained_variance", NOT_MATCHED, recipe("masked 1.0")),
            difference("explained_variance", LOWER, recipe("masked 0.25"), n=1),
        ),
        COLUMNS,
    )
    assert "in 1 of 1" in said


def test_a_line_for_each_claim_column_in_the_order_of_the_claims():
    found = compared(planted(("unmasked", "masked 0.5", "gaussian (matched 0.5)"), n_seeds=3))
    lines = wording.verdict_lines(found, COLUMNS)
    assert [line.partition(":")[0] for line in lines] == [
        "absorption same",
        "absorption two",
        "absorption cross",
        "first-letter absorption",
        "AUC1",
        "AUC16",
        "gap to dense 16",
        "EV",
        "Jaccard",
    ]
    for line in lines:
        assert line.index("masked ") < line.index("noise ") < line.index("masked minus noise ")


def test_a_line_says_what_is_unreliable():
    found = comparison(
        difference("explained_variance", LOWER), unreliable={"explained_variance": "a stone scores better"}
    )
    (line,) = wording.verdict_lines(found, COLUMNS)
    assert line == "EV: masked lower (−0.100 [−0.150, −0.050]); unreliable alone: a stone scores better"


def test_a_few_comparisons_are_listed_and_many_counted():
    column = "explained_variance"
    few = [difference(column, LOWER), difference(column, NONE_SEEN, recipe("masked 0.5", "topk"))]
    assert wording.tally(few) == "lower (batchtopk −0.100), no difference seen (topk +0.100)"
    many = [difference(column, LOWER, recipe("masked 0.5", k=k), mean=k / 100) for k in (1, 2, 3)]
    many.append(difference(column, HIGHER, recipe("masked 0.5", k=4)))
    assert wording.tally(many) == "lower in 3, higher in 1 of 4 (means −0.030 to +0.100)"


def test_multiplicity_counts_each_family_apart():
    lines = wording.multiplicity(
        comparison(
            difference("explained_variance", LOWER),
            difference("sae_top_1_test_auc", NONE_SEEN, mean=0.01),
            difference("mcc", HIGHER),
            difference("mcc", NOT_MATCHED),
        )
    )
    assert len(lines) == 2
    assert lines[0].startswith(
        "2 paired comparisons were tested in the columns of the claims, masked against unmasked training"
    )
    assert "Here 1 does, and 1 stays significant" in lines[0]
    assert lines[1].startswith("1 paired")


def test_multiplicity_without_a_test_says_so():
    assert wording.multiplicity(comparison()) == []
    (line,) = wording.multiplicity(comparison(difference("mcc", LOWER, n=1)))
    assert line.startswith("Nothing was tested")


def test_faults_are_told_once_with_all_their_columns():
    found = wording.faults({"llm_test_auc": "bad", "explained_variance": "bad", "mcc": "worse"}, COLUMNS)
    assert found == [("EV, llm_test_auc", "bad"), ("MCC", "worse")]


def test_a_pair_is_named_by_both():
    assert wording.pair(MASKED, PLAIN) == "batchtopk masked 0.5 minus unmasked, k 6"
    assert wording.pair(recipe("small"), PLAIN) == "batchtopk unmasked minus unmasked (220 and 512 latents), k 6"


def test_the_terminal_table_has_the_terminal_columns_of_a_few_recipes():
    lines = wording.terminal_table(compared(planted(controls=False)), COLUMNS).splitlines()
    assert lines[0].split() == ["seeds", "L0", "EV"]
    assert len(lines) == 3
    assert lines[1].startswith("batchtopk unmasked")
    assert "±" in lines[1]


def test_the_terminal_table_of_many_recipes_has_the_claims_alone_and_ends_early():
    found = compared(planted(EIGHT, ("batchtopk", "jumprelu", "matryoshka"), (3, 6, 12), 1, controls=False))
    lines = wording.terminal_table(found, COLUMNS).splitlines()
    assert len(lines) == 1 + wording.MAX_ROWS + 1
    assert lines[-1] == "… 32 more in report.html"
    assert "gap to dense 16" in lines[0]
    assert "raw L0" not in lines[0]
