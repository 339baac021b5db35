"""Recovery of ground-truth features, on SAEs built by hand and against scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from evaluate_fixtures import D_MODEL, N_PARENTS, child_number, planted_language, planted_sae, random_sae, subject_of
from evaluate_fixtures import subject_of_sae as of_sae
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as reference

from evaluate.language import EVERYWHERE
from evaluate.metrics.recovery import COLUMNS, recovery
from evaluate.oracle import fit_oracle
from train.activations import Threshold
from train.sae import SparseAutoencoder


@pytest.fixture(scope="module")
def language():
    return planted_language()


def half_dead() -> SparseAutoencoder:
    """A perfect dictionary of which every other latent never fires."""
    sae = planted_sae(0)
    with torch.no_grad():
        sae.W_enc[:, ::2] = 0
    return sae


def test_a_perfect_dictionary_recovers_everything(language):
    found = recovery(of_sae(planted_sae(0), language))
    assert {name.partition("@")[0] for name in found} == set(COLUMNS)
    assert found["mcc"] == pytest.approx(1.0, abs=0.01)
    assert found["mmcs"] > 0.85  # its rows are the planted directions, and the reference is estimated from text
    for name in ("uniqueness", "f1", "precision", "recall", "f1@letter", "f1@noun", "f1@other"):
        assert found[name] == pytest.approx(1.0)


def test_the_oracle_recovers_everything(language):
    found = recovery(subject_of(fit_oracle(language.even), language))
    for name in COLUMNS:
        assert found[name] == pytest.approx(1.0, abs=1e-5)


def test_dead_latents_cost_and_dictionaries_of_different_size_compare(language):
    sae = half_dead()
    half = recovery(of_sae(sae, language))
    assert half["mcc"] == pytest.approx(0.5, abs=0.02)
    assert half["mmcs"] == pytest.approx(0.5 * recovery(of_sae(planted_sae(0), language))["mmcs"], abs=0.05)
    assert half["uniqueness"] == 0.5
    small = SparseAutoencoder(D_MODEL, D_MODEL // 2, Threshold())  # without those latents: as good, no better
    with torch.no_grad():
        small.W_enc.copy_(sae.W_enc[:, 1::2])
        small.W_dec.copy_(sae.W_dec[1::2])
        small.threshold = sae.threshold
    assert recovery(of_sae(small, language)) == pytest.approx(half, abs=1e-6)


def test_absorbed_children_cost_recall_of_their_parent_and_nothing_else(language):
    """12 of 40 children, with 80 % of the tokens, silence the parent's latent: recall 0.76 for 4 of 170 features."""
    found = recovery(of_sae(planted_sae(12), language))
    assert found["precision"] == pytest.approx(1.0, abs=1e-4)
    assert found["recall"] == pytest.approx(1 - 0.24 * N_PARENTS / D_MODEL, abs=1e-3)
    assert found["f1@letter"] == pytest.approx(2 * 0.76 / 1.76, abs=0.02)
    assert found["f1@noun"] == pytest.approx(1.0)


def test_numbers_are_those_of_numpy_scipy_and_scikit_learn(language):
    subject = of_sae(random_sae(), language)
    rows = language.test.positions[EVERYWHERE]
    latents, features = subject.latents(language.test)[rows].numpy(), language.test.features[rows]
    alive = latents.std(0) > 0
    plain = np.zeros((latents.shape[1], features.shape[1]))
    plain[alive] = np.abs(np.corrcoef(latents[:, alive].T, features.T.astype(float))[: alive.sum(), alive.sum() :])
    found = recovery(subject)
    assert found["mcc"] == pytest.approx(plain[linear_sum_assignment(plain, maximize=True)].sum() / 170, abs=1e-4)
    directions, truth = subject.dictionary.directions.numpy()[alive], fit_oracle(language.even).directions.numpy()
    cosine = directions @ truth.T / np.linalg.norm(directions, axis=1)[:, None] / np.linalg.norm(truth, axis=1)
    assert found["mmcs"] == pytest.approx(cosine[linear_sum_assignment(-cosine)].sum() / 170, abs=1e-4)
    on, best = latents != 0, []
    for feature in features[:, : N_PARENTS + 10].T:
        f1 = [2 * (on[:, j] & feature).sum() / (on[:, j].sum() + feature.sum()) for j in range(on.shape[1])]
        j = int(np.argmax(f1))
        assert f1[j] == pytest.approx(reference.f1_score(feature, on[:, j]))
        best.append(f1[j])
    assert found["f1@letter"] == pytest.approx(np.mean(best[:N_PARENTS]), abs=1e-6)


def test_a_feature_that_never_occurs_does_not_count(language):
    assert language.test.features is not None
    rare = planted_language()
    assert rare.test.features is not None
    rare.test.features[:, child_number(0, 0)] = False
    assert recovery(of_sae(half_dead(), rare))["uniqueness"] == pytest.approx(85 / 169)
