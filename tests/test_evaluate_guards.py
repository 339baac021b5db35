"""Guards: columns in which a control wins are named, and each trap that once made a false result gets its sentence."""

from dataclasses import replace
from typing import Any

from compare_fixtures import COLUMNS, SCORE, recipe, results

from evaluate.compare import compare
from evaluate.recipes import DROPOUT, MATCHED, NOISE, ORACLE, PERMUTED, RANDOM, RANDOM_TOKEN, SMALL, Result


def faults(rows: list[Result], **changes: Any) -> dict[str, str]:
    return compare(rows, {"score": replace(SCORE, **changes)}).unreliable


def test_a_column_in_which_a_control_wins_is_unreliable():
    trained = results(recipe(), [0.5, 0.6, 0.7])
    control = recipe(MATCHED, kind=MATCHED, is_plain=False)
    won = results(control, [0.9, 0.9, 0.9])
    assert "a random batchtopk SAE of equal L0" in faults(trained + won)["score"]
    assert faults(trained + results(control, [0.4, 0.4, 0.4])) == {}
    assert faults(trained + results(control, [0.55, 0.65, 0.75])) == {}  # within two standard errors
    assert faults(trained + won, random_is_worst=False) == {}
    assert faults(trained + results(replace(control, k=12), [0.9] * 3)) == {}
    raw = results(recipe(RANDOM, kind=RANDOM, is_plain=False), [0.9, 0.9, 0.9])
    assert faults(trained + raw) == {}  # it has another L0
    oracle = results(recipe(ORACLE, kind=ORACLE, arch="", is_plain=False), [0.1])
    assert "the oracle" in faults(trained + oracle)["score"]
    assert faults(trained + oracle, oracle_is_best=False) == {}
    assert faults(trained + oracle, better="") == {}


def test_a_shuffled_decoder_that_does_better_is_cautioned_and_flags_nothing():
    """It breaks what absorption is defined by, so it is absorbed less; that does not make the column a bad one."""
    trained = results(recipe(), [0.5, 0.6, 0.7])
    control = recipe(PERMUTED, kind=PERMUTED, is_plain=False)
    assert faults(trained + results(control, [0.9, 0.9, 0.9])) == {}
    assert "decoder rows shuffled does better in sc" in cautions(trained + results(control, [0.9, 0.9, 0.9]))
    assert cautions(trained + results(control, [0.55, 0.65, 0.75])) == ""


def test_controls_are_held_against_trained_ones_on_the_seeds_that_both_have():
    """An encoder's score is the same with a shuffled decoder, whatever seeds the control is measured for."""
    trained = results(recipe(), [0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    same = results(recipe(PERMUTED, kind=PERMUTED, is_plain=False), [0.9, 0.9, 0.9])
    assert faults(trained + same) == {}


def test_one_untrained_sae_may_stand_for_several_architectures():
    control = recipe(MATCHED, kind=MATCHED, is_plain=False)
    rows = results(recipe(), [0.8]) + results(replace(control, arch="topk, batchtopk"), [0.9])
    assert "random batchtopk" in faults(rows)["score"]
    assert faults(results(recipe(), [0.8]) + results(replace(control, arch="topk, matryoshka"), [0.9])) == {}


def cautions(rows: list[Result]) -> str:
    return "\n".join(compare(rows, COLUMNS).cautions)


def test_few_seeds_are_cautioned_and_many_are_not():
    assert "2 seeds of batchtopk unmasked (k 6, 512 latents): fewer than 3" in cautions(results(recipe(), [1.0, 2.0]))
    assert cautions(results(recipe(), [1.0, 2.0, 3.0])) == ""


def test_controls_that_are_missing_are_named():
    rows = results(recipe(), [1.0, 2.0, 3.0]) + results(recipe("masked 0.5"), [1.0, 2.0, 3.0])
    for words in ("no noise run", "no dropout run", "no random-token run", "no smaller dictionary"):
        assert words in cautions(rows)
    for control in (NOISE, DROPOUT, RANDOM_TOKEN):
        rows += results(recipe(control, control=control), [1.0, 2.0, 3.0])
    assert "stand no smaller dictionary (a second --d-sae);" in cautions(rows)
    rows += results(recipe(d_sae=128, control=SMALL), [1.0, 2.0, 3.0])
    assert cautions(rows) == ""


def arms(base: dict[str, list[float]], other: dict[str, list[float]]) -> list[Result]:
    """A plain arm and a noise arm (which lacks no controls), from columns of three seeds."""
    rows = []
    for of, columns in ((recipe(), base), (recipe("gaussian 0.4", control=NOISE), other)):
        for seed in range(3):
            values = {name: numbers[seed] for name, numbers in columns.items()}
            rows.append(Result(run="", recipe=of, seed=seed, values=values))
    return rows


def test_a_drop_that_shrank_because_the_usual_score_fell_is_cautioned():
    base = {"ood_drop_16": [0.10, 0.11, 0.12], "sae_top_16_test_auc": [0.90, 0.91, 0.92]}
    fell = {"ood_drop_16": [0.05, 0.07, 0.06], "sae_top_16_test_auc": [0.85, 0.87, 0.86]}
    rose = {**fell, "sae_top_16_test_auc": [0.95, 0.97, 0.96]}
    wide = {**fell, "sae_top_16_test_auc": [0.70, 1.00, 0.98]}  # lower by less than a standard error

    def said(other: dict[str, list[float]]) -> bool:
        rows = arms(base, other)
        columns = dict.fromkeys(base, SCORE)
        return any("shrank at least in part" in sentence for sentence in compare(rows, columns).cautions)

    assert said(fell)
    assert not said(rose)
    assert not said(wide)
    assert not said(base)


def test_dead_latents_are_a_smaller_dictionary():
    rows = arms({"dead_latents": [12.0] * 3}, {"dead_latents": [212.0] * 3})
    (caution,) = compare(rows, {"dead_latents": SCORE}).cautions
    assert "batchtopk gaussian 0.4 (k 6, 512 latents) has 300 (40% fewer)" in caution
    assert "no smaller dictionary stands in the table" in caution
    rows += results(recipe(d_sae=256, control=SMALL), [0.0] * 3, column="dead_latents")
    (caution,) = compare(rows, {"dead_latents": SCORE}).cautions
    assert "compare with batchtopk unmasked (k 6, 256 latents), which has 256" in caution
    assert not compare(
        arms({"dead_latents": [12.0] * 3}, {"dead_latents": [50.0] * 3}), {"dead_latents": SCORE}
    ).cautions


def test_what_nominal_k_would_have_hidden_is_said():
    (caution,) = compare(arms({"l0_raw": [5.0] * 3}, {"l0_raw": [6.2] * 3}), {"l0_raw": SCORE}).cautions
    assert "at nominal k these would have had more latents on" in caution
    assert "batchtopk gaussian 0.4 (k 6, 512 latents) 24%" in caution
    assert not compare(arms({"l0_raw": [5.0] * 3}, {"l0_raw": [5.09] * 3}), {"l0_raw": SCORE}).cautions


def test_a_control_without_a_number_for_some_seed_is_held_against_nobody():
    trained = results(recipe(), [0.5, 0.6, 0.7])
    control = recipe(PERMUTED, kind=PERMUTED, is_plain=False)
    some = results(control, [0.9], first_seed=0) + results(control, [0.0], column="other", first_seed=1)
    assert faults(trained + some) == {}
