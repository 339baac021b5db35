"""Absorption, leakage and the worked example on SAEs built by hand, where the right answer is known."""

from typing import Any

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
from sklearn import metrics as reference

from evaluate.absorbed import mean_per_child, parent_latents, rates_of, tokens_of_parent
from evaluate.best_latent import best_latents
from evaluate.example import recall_example
from evaluate.leakage import leakage, over_parents
from evaluate.metrics.absorption import COLUMNS, FAMILIES, absorption
from evaluate.oracle import fit_oracle
from evaluate.truth import Truth
from harvest import embedded

QUIET: dict[str, Any] = {"zero_division": 0}  # scikit-learn warns where nothing is predicted


@pytest.fixture(scope="module")
def language():
    return planted_language()


@pytest.fixture(scope="module")
def long_language():
    """Every child is on often enough to have a latent and a direction."""
    return planted_language(12000)


@pytest.mark.parametrize("n_absorbed", [0, 4, 12, 20])
def test_planted_absorption_is_found_exactly(language, n_absorbed):
    """Of 40 children of every parent, 0, 4, 12 or 20 are absorbed, all their tokens and no others."""
    values = absorption(subject_of_sae(planted_sae(n_absorbed), language))
    planted = n_absorbed / N_CHILDREN
    for name in ("full_absorption", "full_absorption_saebench", "absorption_fraction", "silent"):
        assert values[f"{name}_same_token"] == pytest.approx(planted, abs=1e-9)
    assert values["represented_parents_same_token"] == 1.0
    assert values["main_latent_f1_same_token"] == pytest.approx(1 - 0.8 * planted / (2 - 0.8 * planted), abs=0.02)
    assert {name.partition("@")[0] for name in values} <= set(COLUMNS)
    assert values["mean_full_absorption_score"] == values["full_absorption_same_token"]
    assert values["mean_num_split_features"] == 1.0
    assert values["full_absorption_saebench_same_token@letter L2"] == pytest.approx(planted, abs=1e-9)


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


def without_latents(*parents: int):
    """No absorption; the latents of some parents never fire, and nothing carries their directions."""
    sae = planted_sae(0)
    with torch.no_grad():
        sae.W_enc[:, list(parents)] = 0
    return sae


def test_a_parent_that_nothing_shows_is_left_out_of_the_headline(language):
    """Half of the parents are missing, and the others are absorbed by 12 of 40 children."""
    sae = planted_sae(12)
    with torch.no_grad():
        for parent in (0, 1):
            sae.W_enc[:, parent] = 0
            sae.W_dec[child_number(parent, 0) : child_number(parent, N_CHILDREN), parent] = 0
    values = absorption(subject_of_sae(sae, language))
    assert values["represented_parents_same_token"] == 0.5
    assert values["full_absorption_same_token"] == pytest.approx(0.3, abs=1e-9)
    assert values["full_absorption_saebench_same_token"] == pytest.approx(0.15, abs=1e-9)  # twice as good, unjustly


def test_without_half_of_the_parents_there_is_no_headline_rather_than_a_good_one(language):
    values = absorption(subject_of_sae(without_latents(0, 1, 2), language))
    assert values["represented_parents_same_token"] == 0.25
    assert "full_absorption_same_token" not in values
    assert values["full_absorption_saebench_same_token"] == 0.0
    assert values["silent_same_token"] > 0.6


def test_a_silent_parent_that_nothing_carries_is_a_hole_but_not_absorbed(language):
    sae = planted_sae(12)
    with torch.no_grad():
        sae.W_dec[:, :N_PARENTS] = torch.eye(len(sae.W_dec))[:, :N_PARENTS]  # children no longer carry the parent
    values = absorption(subject_of_sae(sae, language))
    assert values["silent_same_token"] == pytest.approx(0.3, abs=1e-9)
    assert values["full_absorption_same_token"] == 0.0


def test_rates_are_type_weighted():
    """Frequent children do not count more: only one child is absorbed, and most tokens are its own."""
    crowded = planted_language()
    for part in (crowded.fit, crowded.test):
        parent, child = part.attributes["letter"], part.attributes["noun"]
        many = (child >= 0) & (np.arange(part.n) % 2 == 0)  # half of the tokens become the first child of their parent
        for row in np.flatnonzero(many):
            old, new = N_PARENTS + child[row], child_number(parent[row], 0)
            part.x[row, old], part.x[row, new] = part.x[row, new].clone(), part.x[row, old].clone()
            child[row] = parent[row] * N_CHILDREN
    subject = subject_of_sae(planted_sae(1), crowded)
    values = absorption(subject)
    assert values["mean_num_split_features"] == 2.0  # so frequent a child counts as a latent of the parent
    assert values["full_absorption_same_token"] == 0.0
    tokens = tokens_of_parent(subject, crowded.parents[0], 0, np.array([0]))
    rates = rates_of(tokens)
    assert rates is not None
    assert tokens.silent[tokens.child >= 0].mean() > 0.4
    assert rates.silent == pytest.approx(1 / N_CHILDREN)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_mean_per_child_is_the_plain_loop(pairs):
    child, values = np.array([c for c, _ in pairs]), np.array([v for _, v in pairs])
    expected = [values[child == c].mean() for c in sorted(set(child.tolist()))]
    np.testing.assert_allclose(mean_per_child(values, child), expected)
    assert over_parents(values, child) == pytest.approx(np.mean(expected))


def test_full_absorption_follows_its_definition_token_by_token(language):
    """The vectorised measure against the words of its docstring, on an SAE with random weights."""
    subject = subject_of_sae(random_sae(), language)
    parents = language.parents[0]
    main = parent_latents(subject, parents)
    found = tokens_of_parent(subject, parents, 1, main[1])
    rows = parents.rows[parents.right[1]][:200]
    x, latents = language.test.x[rows], subject.latents(language.test)[rows]
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


def test_the_latents_of_a_parent_are_chosen_on_the_fit_text_alone():
    subject = subject_of_sae(turned_sae(), turned_language())
    assert subject.bench.language is not None
    (parents,) = subject.bench.language.parents
    yes = parents.classes.tolist().index(1)
    assert parent_latents(subject, parents)[yes].tolist() == [0]


def test_the_oracle_absorbs_and_leaks_nothing(long_language):
    values = absorption(subject_of(fit_oracle(long_language.even), long_language))
    for name in ("full_absorption", "silent", "full_absorption_truth"):
        assert values[f"{name}_same_token"] == 0.0
    assert values["leak_dec_same_token"] == pytest.approx(0.0, abs=1e-4)
    assert values["represented_parents_same_token"] == 1.0
    assert values["n_children_with_latent_same_token"] == N_PARENTS * N_CHILDREN
    assert "leak_enc_same_token" not in values  # it reads labels, so it has no encoder


@pytest.mark.parametrize("n_absorbed", [0, 12])
def test_planted_leaks_are_found(long_language, n_absorbed):
    """An absorbing child's latent writes all of its parent, and its own direction lowers the parent's latent by 4 of 2.

    The directions are estimated from text, hence the tolerance.
    """
    values = absorption(subject_of_sae(planted_sae(n_absorbed), long_language))
    planted = n_absorbed / N_CHILDREN
    assert values["full_absorption_truth_same_token"] == pytest.approx(planted, abs=1e-9)
    assert values["leak_dec_same_token"] == pytest.approx(planted, abs=0.02)
    assert values["leak_enc_same_token"] == pytest.approx(2 * planted, rel=0.1, abs=0.04)
    assert values["n_children_with_latent_same_token"] == N_PARENTS * N_CHILDREN


def test_a_decoder_that_takes_the_parent_away_leaks_below_zero(long_language):
    sae = planted_sae(0)
    with torch.no_grad():
        for parent in range(N_PARENTS):
            sae.W_dec[child_number(parent, 0) : child_number(parent, N_CHILDREN), parent] = -1.0  # half of its 2
    assert absorption(subject_of_sae(sae, long_language))["leak_dec_same_token"] == pytest.approx(-0.5, abs=0.02)


def test_children_without_a_latent_are_not_counted(long_language):
    sae = planted_sae(12)
    with torch.no_grad():
        for parent in range(N_PARENTS):  # the last ten children of every parent have no latent
            sae.W_enc[:, child_number(parent, N_CHILDREN - 10) : child_number(parent, N_CHILDREN)] = 0
    values = absorption(subject_of_sae(sae, long_language))
    assert values["n_children_with_latent_same_token"] == N_PARENTS * 30
    assert values["full_absorption_truth_same_token"] == pytest.approx(12 / 30, abs=1e-9)
    assert values["leak_dec_same_token"] == pytest.approx(12 / 30, abs=0.03)


def test_leakage_is_the_slow_loop(long_language):
    """Every child one by one with numpy, on a planted SAE with disturbed weights."""
    sae = planted_sae(12)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_dec.add_(0.1 * torch.randn(sae.W_dec.shape, generator=generator))
        sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator))
    subject, effects = subject_of_sae(sae, long_language), long_language.truth.effects.numpy()
    fit, test = (subject.latents(rows).numpy() for rows in (long_language.fit, long_language.test))
    on, letters, nouns = fit != 0, *(long_language.fit.attributes[name] for name in ("letter", "noun"))

    def best(label: np.ndarray) -> tuple[int, float]:
        f1 = [2 * (on[:, j] & label).sum() / (on[:, j].sum() + label.sum()) for j in range(D_MODEL)]
        return int(np.argmax(f1)), max(f1)

    absorbed, own, other, suppressed = ([[] for _ in range(N_PARENTS)] for _ in range(4))
    for parent in range(N_PARENTS):
        p, _ = best(letters == parent)
        level = fit[(letters == parent) & on[:, p], p].mean()
        for noun in range(parent * N_CHILDREN, (parent + 1) * N_CHILDREN):
            feature = N_PARENTS + noun
            suppressed[parent].append(-(sae.W_enc[:, p].detach().numpy() @ effects[feature]) / level)
            c, f1 = best(nouns == noun)
            if f1 < 0.3:
                continue
            here = test[long_language.test.attributes["noun"] == noun]
            absorbed[parent].append(np.mean((here[:, p] == 0) & (here[:, c] > 0)))
            vector = fit[(nouns == noun) & on[:, c], c].mean() * sae.W_dec[c].detach().numpy()
            factors = np.linalg.lstsq(effects[[feature, parent]].T, vector, rcond=None)[0]
            own[parent].append(factors[0])
            other[parent].append(factors[1])
    means = [np.mean([np.mean(values) for values in lists]) for lists in (absorbed, own, other, suppressed)]
    found = leakage(subject, long_language.parents[0])
    assert 20 < found.n_with_latent == sum(map(len, absorbed)) < found.n_children
    assert found.full_absorption == pytest.approx(means[0])
    assert found.decoder == pytest.approx(means[2] / means[1], rel=1e-4)
    assert found.encoder == pytest.approx(means[3], rel=1e-4)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
@settings(max_examples=20, deadline=None)
def test_the_best_latent_is_that_of_scikit_learn(seed, density):
    generator = np.random.default_rng(seed)
    latents = generator.random((60, 7)) * (generator.random((60, 7)) < density)
    labels = generator.random((60, 4)) < 0.3
    best = best_latents(torch.from_numpy(latents), torch.from_numpy(labels))
    for i in range(4):
        scores = [reference.f1_score(labels[:, i], latents[:, j] != 0, **QUIET) for j in range(7)]
        number = int(best.number[i])
        on = latents[:, number] != 0
        assert float(best.f1[i]) == pytest.approx(max(scores)) == pytest.approx(scores[number])
        assert float(best.precision[i]) == pytest.approx(reference.precision_score(labels[:, i], on, **QUIET))
        assert float(best.recall[i]) == pytest.approx(reference.recall_score(labels[:, i], on, **QUIET))
        both = labels[:, i] & on
        assert float(best.usual[i]) == pytest.approx(latents[both, number].mean() if both.any() else 0.0)


def test_what_a_child_implies_and_what_only_goes_with_it_are_told_apart(long_language):
    truth = Truth.of(long_language.even, long_language.feature_names)
    child, parent = truth.number["noun L1n3"], truth.number["letter L1"]
    assert np.flatnonzero(truth.implied[child]).tolist() == [parent]
    assert not truth.implied[parent].any()
    assert not len(truth.pairs)  # parents imply nothing, and children only their own parent


def test_the_worked_example_names_the_absorbing_latents(language):
    sae = planted_sae(12)
    with torch.no_grad():  # parent 2 is absorbed most, the others not at all
        for parent in (0, 1, 3):
            sae.W_enc[:, parent] = 3 * torch.eye(len(sae.W_enc))[:, parent]
    example = recall_example(subject_of_sae(sae, language))
    assert example.parent == "letter L2"
    assert example.latents == (2,)
    for bar in example.bars:
        child = int(bar.child.split("n")[1])
        absorbed = child < 12
        assert bar.firing == (0.0 if absorbed else 1.0)
        assert bar.absorbed == (1.0 if absorbed else 0.0)
        assert bar.absorber == (f"latent {child_number(2, child)} (noun L2n{child}, F1 1.00)" if absorbed else "")
    assert [bar.firing for bar in example.bars] == sorted(bar.firing for bar in example.bars)


def test_the_claims_are_about_the_headline_of_each_family():
    claims = {f"{name}_{family}" for name in ("full_absorption", "full_absorption_truth") for family in FAMILIES}
    assert {name for name, column in COLUMNS.items() if column.claim} == claims
    assert all(column.reliable for column in COLUMNS.values() if column.claim or column.short)
