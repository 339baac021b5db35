"""Metrics on SAEs built by hand in a planted world, where the right answer is known."""

import numpy as np
import pytest
import torch
from evaluate_fixtures import (
    D_MODEL,
    N_CHILDREN,
    N_PARENTS,
    child_number,
    planted_language,
    planted_sae,
    random_sae,
    subject_of,
    subject_of_sae,
    turned_language,
    turned_sae,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.compare import Recipe
from evaluate.example import recall_example
from evaluate.language import EVERYWHERE
from evaluate.metrics.absorption import COLUMNS, absorption, mean_per_child, parent_latents, tokens_of_parent
from evaluate.metrics.ood import ood
from evaluate.metrics.probing import probing
from evaluate.metrics.recovery import recovery
from evaluate.oracle import fit_oracle
from harvest import embedded
from train.activations import Threshold
from train.sae import SparseAutoencoder

RECIPE = Recipe(bench="planted", arch="batchtopk", k=3, d_sae=170, name="unmasked")


@pytest.fixture(scope="module")
def language():
    return planted_language()


@pytest.mark.parametrize("n_absorbed", [0, 4, 12])
def test_planted_absorption_is_found_exactly(language, n_absorbed):
    """Of 40 children of every parent, 0, 4 or 12 are absorbed, all their tokens and no others."""
    values = absorption(subject_of_sae(planted_sae(n_absorbed), language))
    planted = n_absorbed / N_CHILDREN
    assert values["full_absorption_same_token"] == pytest.approx(planted, abs=1e-9)
    assert values["absorption_fraction_same_token"] == pytest.approx(planted, abs=1e-9)
    assert values["silent_same_token"] == pytest.approx(planted, abs=1e-9)
    assert values["main_latent_f1_same_token"] == pytest.approx(1 - 0.8 * planted / (2 - 0.8 * planted), abs=0.02)
    assert set(values) <= set(COLUMNS)
    assert values["mean_full_absorption_score"] == values["full_absorption_same_token"]
    assert values["mean_num_split_features"] == 1.0


def test_the_recall_gap_is_measured_where_the_parent_occurs_without_a_child():
    values = absorption(subject_of_sae(planted_sae(12), planted_language(family="cross_token")))
    assert values["recall_gap_cross_token"] == pytest.approx(0.3, abs=1e-9)
    assert COLUMNS["recall_gap_cross_token"].short == "gap cross"


def test_recall_gaps_are_declared_for_the_families_that_have_them():
    corpus = embedded.generate(100, seed=0)
    found = {
        relation.family
        for relation in embedded.RELATIONS
        if (
            corpus.positions[relation.positions]
            & (corpus.attributes[relation.parent] >= 0)
            & (corpus.attributes[relation.child] < 0)
        ).any()
    }
    assert found == {name.removeprefix("recall_gap_") for name in COLUMNS if name.startswith("recall_gap_")}


def test_a_silent_parent_that_nothing_carries_is_a_hole_but_not_absorbed(language):
    sae = planted_sae(12)
    with torch.no_grad():
        sae.W_dec[:, :N_PARENTS] = torch.eye(len(sae.W_dec))[:, :N_PARENTS]  # children no longer carry the parent
    values = absorption(subject_of_sae(sae, language))
    assert values["silent_same_token"] == pytest.approx(0.3, abs=1e-9)
    assert values["full_absorption_same_token"] == 0.0


def test_rates_are_type_weighted(language):
    """Frequent children do not count more: only one child is absorbed, and most tokens are its own."""
    crowded = planted_language()
    for part in (crowded.fit, crowded.test):
        parent, child = part.attributes["letter"], part.attributes["noun"]
        many = (child >= 0) & (np.arange(part.n) % 2 == 0)  # half of the tokens become the first child of their parent
        for row in np.flatnonzero(many):
            old, new = N_PARENTS + child[row], child_number(parent[row], 0)
            part.x[row, old], part.x[row, new] = part.x[row, new].clone(), part.x[row, old].clone()
            child[row] = parent[row] * N_CHILDREN
    values = absorption(subject_of_sae(planted_sae(1), crowded))
    assert values["mean_num_split_features"] == 2.0  # so frequent a child counts as a latent of the parent
    assert values["full_absorption_same_token"] == 0.0
    parents = crowded.parents[0]
    tokens = tokens_of_parent(subject_of_sae(planted_sae(1), crowded), parents, 0, np.array([0]))
    with_child = tokens.child >= 0
    assert tokens.silent[with_child].mean() > 0.4
    per_child = mean_per_child(tokens.silent[with_child], tokens.child[with_child])
    assert per_child.mean() == pytest.approx(1 / N_CHILDREN)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_mean_per_child_is_the_plain_loop(pairs):
    child, values = np.array([c for c, _ in pairs]), np.array([v for _, v in pairs])
    expected = [values[child == c].mean() for c in sorted(set(child.tolist()))]
    np.testing.assert_allclose(mean_per_child(values, child), expected)


def test_full_absorption_follows_its_definition_token_by_token(language):
    """The vectorised measure against the words of its docstring, on an SAE with random weights."""
    subject = subject_of_sae(random_sae(), language)
    parents = language.parents[0]
    main = parent_latents(subject, parents)
    found = tokens_of_parent(subject, parents, 1, main[1])
    rows = parents.rows[parents.right[1]][:200]
    x, latents = language.test.x[rows], subject.latents("test")[rows]
    w, decoder = parents.directions[1], subject.dictionary.directions
    for i in range(len(rows)):
        others = [j for j in range(len(decoder)) if j not in main[1]]
        carried = {j: float(latents[i, j] * (decoder[j] @ w)) for j in others}
        top = max(carried, key=lambda j: carried[j])
        total = float((x[i] - subject.dictionary.offset) @ w)
        cosine = float(decoder[top] @ w / decoder[top].norm())
        silent = bool((latents[i, main[1].tolist()] == 0).all())
        full = silent and cosine >= 0.025 and total > 0 and carried[top] >= 0.4 * total
        assert found.full_absorption[i] == full
        assert found.silent[i] == silent


def test_a_perfect_dictionary_recovers_everything_and_dead_latents_cost(language):
    whole = recovery(subject_of_sae(planted_sae(0), language))
    assert whole["mcc"] == pytest.approx(1.0, abs=0.01)
    assert whole["uniqueness"] == 1.0
    assert whole["f1"] == pytest.approx(1.0)
    sae = planted_sae(0)
    with torch.no_grad():
        sae.W_enc[:, ::2] = 0  # every other latent never fires
    half = recovery(subject_of_sae(sae, language))
    assert half["mcc"] == pytest.approx(0.5, abs=0.02)
    assert half["uniqueness"] == 0.5
    small = SparseAutoencoder(D_MODEL, D_MODEL // 2, Threshold())  # without those latents: as good, no better
    with torch.no_grad():
        small.W_enc.copy_(sae.W_enc[:, 1::2])
        small.W_dec.copy_(sae.W_dec[1::2])
        small.threshold = sae.threshold
    found = recovery(subject_of_sae(small, language))
    assert found == pytest.approx(half, abs=1e-6)


def test_correlations_of_recovery_are_pearsons(language):
    subject = subject_of_sae(random_sae(), language)
    rows = language.test.positions[EVERYWHERE]
    latents, features = subject.latents("test")[rows].numpy(), language.test.features[rows]
    alive = latents.std(0) > 0
    plain = np.zeros((latents.shape[1], features.shape[1]))
    plain[alive] = np.abs(np.corrcoef(latents[:, alive].T, features.T.astype(float))[: alive.sum(), alive.sum() :])
    from scipy.optimize import linear_sum_assignment

    matched = plain[linear_sum_assignment(plain, maximize=True)]
    assert recovery(subject)["mcc"] == pytest.approx(matched.sum() / plain.shape[1], abs=1e-4)


def test_probes_are_perfect_on_a_perfect_dictionary_and_poor_on_a_random_one(language):
    good, poor = probing(subject_of_sae(planted_sae(0), language)), probing(subject_of_sae(random_sae(), language))
    assert good["sae_top_1_test_auc"] == pytest.approx(1.0, abs=1e-3)
    assert good["sae_top_1_test_balanced_accuracy_shifted"] == pytest.approx(1.0, abs=1e-3)
    assert poor["sae_top_1_test_auc"] < 0.75
    assert poor["sae_top_1_test_auc"] < poor["sae_top_5_test_auc"] < poor["sae_top_16_test_auc"]
    assert good["llm_test_auc"] == poor["llm_test_auc"] == pytest.approx(1.0, abs=1e-3)


def test_absorption_shows_in_the_best_single_latent(language):
    """A parent latent that is silent on 12 of 40 children misses 0.8 x 0.3 of its tokens: AUC = 1 - 0.24 / 2."""
    values = probing(subject_of_sae(planted_sae(12), language))
    assert values["sae_top_1_test_auc"] == pytest.approx(0.88, abs=0.02)


def test_gaps_are_differences_of_the_probing_numbers(language):
    subject = subject_of_sae(random_sae(), language)
    scores, gaps = probing(subject), ood(subject)
    for k in (1, 5, 16):
        shifted = scores[f"sae_top_{k}_test_auc_shifted"]
        assert gaps[f"ood_gap_to_dense_{k}"] == pytest.approx(scores["llm_test_auc_shifted"] - shifted)
        assert gaps[f"ood_drop_{k}"] == pytest.approx(scores[f"sae_top_{k}_test_auc"] - shifted)


def test_probes_are_chosen_and_fitted_on_the_fit_text_alone():
    """What fit text says is turned round on test text, so a probe that never saw it is wrong there."""
    values = probing(subject_of_sae(turned_sae(), turned_language()))
    assert values["sae_top_1_test_auc_shifted"] == pytest.approx(0.9, abs=0.03)
    assert values["sae_top_1_test_auc"] == pytest.approx(0.1, abs=0.03)
    assert values["sae_top_5_test_auc"] < 0.5  # both latents, weighed as the fit text says


def test_the_latents_of_a_parent_are_chosen_on_the_fit_text_alone():
    subject = subject_of_sae(turned_sae(), turned_language())
    assert subject.bench.language is not None
    (parents,) = subject.bench.language.parents
    yes = parents.classes.tolist().index(1)
    assert parent_latents(subject, parents)[yes].tolist() == [0]


def test_the_oracle_bounds_what_it_should(language):
    subject = subject_of(fit_oracle(language.even), language)
    assert absorption(subject)["full_absorption_same_token"] == 0.0
    assert absorption(subject)["silent_same_token"] == 0.0
    assert probing(subject)["sae_top_1_test_auc_shifted"] == pytest.approx(1.0)
    assert recovery(subject)["mcc"] == pytest.approx(1.0, abs=1e-5)


def test_the_oracles_directions_are_the_planted_ones(language):
    oracle = fit_oracle(language.even)
    for number in (0, child_number(2, 7)):  # children add to their parent, they do not contain it
        effect = oracle.directions[number] * oracle.strength[number]
        others = torch.cat([effect[:number], effect[number + 1 :]])
        assert others.abs().max() < 0.4 * effect[number]
    codes = oracle.encode(language.test)
    assert ((codes != 0).numpy() == language.test.features).all()


def test_the_worked_example_names_the_absorbing_latents(language):
    sae = planted_sae(12)
    with torch.no_grad():  # parent 2 is absorbed most, the others not at all
        for parent in (0, 1, 3):
            sae.W_enc[:, parent] = 3 * torch.eye(len(sae.W_enc))[:, parent]
    subject = subject_of_sae(sae, language)
    example = recall_example(subject, recipe=RECIPE, seed=0)
    assert example.parent == "letter L2"
    assert example.latents == (2,)
    for bar in example.bars:
        absorbed = int(bar.child.split("n")[1]) < 12
        assert bar.firing == (0.0 if absorbed else 1.0)
        assert bar.absorbed == (1.0 if absorbed else 0.0)
        number = child_number(2, int(bar.child.split("n")[1]))
        assert bar.absorber == (f"latent {number} (feature {number}, F1 1.00)" if absorbed else "")
    assert [bar.firing for bar in example.bars] == sorted(bar.firing for bar in example.bars)
