"""Probes and scores, each against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.linear_model import LogisticRegression

from evaluate import probes
from evaluate.latent_choice import by_scaled_difference, fit_sparse, gather, main_latents, mean_nonzero
from evaluate.probes import (
    Standard,
    auc,
    balanced_accuracy,
    f1_score,
    fit_dense,
    fit_logistic,
    logits,
    mean_difference,
    one_hot,
    scores_of,
)


def problem(n: int, k: int, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, k] of very different sizes and labels [n], about a fifth of them on."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator) * torch.arange(1, k + 1)
    signal = (x / torch.arange(1, k + 1)).sum(1) + noise * torch.randn(n, generator=generator)
    return x, signal > signal.quantile(0.8)


@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["separable", "noisy"])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_newton_finds_what_scikit_learn_finds(k, noise):
    problems = [problem(400, k, seed, noise) for seed in range(3)]
    x, y = torch.stack([x for x, _ in problems]), torch.stack([y for _, y in problems])
    weights = fit_logistic(x, y, penalty=0.5)
    for i in range(3):
        probe = LogisticRegression(C=2.0, class_weight="balanced", tol=1e-8, max_iter=5000).fit(x[i], y[i])
        expected = np.append(probe.coef_[0], probe.intercept_[0])
        np.testing.assert_allclose(weights[i].numpy(), expected, rtol=2e-3, atol=2e-3)


def test_dense_probes_are_the_batched_ones_fitted_one_by_one():
    x, _ = problem(300, 6, 0, 1.0)
    labels = torch.stack([x[:, 0] > 0, x[:, 1] > 1, x.sum(1) > 0])
    together = fit_logistic(x.expand(3, -1, -1), labels)
    torch.testing.assert_close(fit_dense(x, labels), together, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(x, together), logits(x.expand(3, -1, -1), together))


def test_a_probe_with_more_features_than_rows_is_what_scikit_learn_finds():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 200, generator=generator)
    y = x[:, 0] + torch.randn(60, generator=generator) > 0.5
    weights = fit_dense(x, y.unsqueeze(0), penalty=10.0)[0]
    probe = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(weights.numpy(), np.append(probe.coef_[0], probe.intercept_[0]), rtol=2e-3, atol=2e-4)


def test_a_probe_with_one_class_only_stays_finite():
    x, _ = problem(50, 2, 0, 1.0)
    weights = fit_logistic(x.unsqueeze(0), torch.zeros(1, 50, dtype=torch.bool))
    assert weights.isfinite().all()
    assert (logits(x, weights) < 0).all()


@given(
    scores=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=4, max_size=30),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_scores_equal_scikit_learn_ties_included(scores, seed):
    labels = np.random.default_rng(seed).random(len(scores)) < 0.5
    labels[:2] = [True, False]
    values = np.array([scores])
    y, predicted = labels[None], values > 0
    assert auc(values, y)[0] == pytest.approx(reference.roc_auc_score(labels, values[0]))
    assert balanced_accuracy(predicted, y)[0] == pytest.approx(reference.balanced_accuracy_score(labels, predicted[0]))
    assert f1_score(predicted, y)[0] == pytest.approx(reference.f1_score(labels, predicted[0]))


def test_auc_needs_both_classes():
    assert np.isnan(auc(np.array([[0.1, 0.2]]), np.array([[True, True]])))[0]


def test_mean_difference_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    latents = torch.relu(torch.randn(500, 7, generator=generator))
    latents[:, 3] = 0  # a dead latent
    latents[:, 4] = 2.5  # one that never changes
    labels = torch.stack([torch.arange(500) % 3 == c for c in range(3)])
    found = mean_difference(latents, labels)
    for c in range(3):
        on, off = latents[labels[c]], latents[~labels[c]]
        expected = (on.mean(0) - off.mean(0)) / latents.std(0, correction=0).clamp(min=1e-9)
        expected[[3, 4]] = 0
        torch.testing.assert_close(found[c], expected, rtol=1e-4, atol=1e-5)


def test_a_standard_shifts_and_scales_and_leaves_a_constant_alone():
    features = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    torch.testing.assert_close(Standard.of(features).apply(features), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


def test_latents_are_chosen_by_the_difference_of_class_means_in_units_of_their_mean_activation():
    """A slow loop over classes and latents; one latent is on a thousand times stronger, which changes nothing."""
    generator = torch.Generator().manual_seed(4)
    latents = torch.relu(torch.randn(300, 8, generator=generator) - 0.5)
    latents[:, 6] = 0  # a dead latent has no scale, and comes last
    labels = torch.stack([torch.arange(300) % 3 == c for c in range(3)])
    scale = mean_nonzero(latents)
    found = by_scaled_difference(latents, scale, labels, 99)
    for c in range(3):
        sizes = []
        for i in range(8):
            values = latents[:, i].numpy()
            mean = values[values != 0].mean() if values.any() else 1.0
            sizes.append(abs(values[labels[c]].mean() - values[~labels[c]].mean()) / mean)
        assert found[c].tolist() == np.argsort(sizes)[::-1].tolist()
    stronger = latents * torch.tensor([1, 1000, 1, 1, 1, 1, 1, 1])
    assert torch.equal(by_scaled_difference(stronger, mean_nonzero(stronger), labels, 3), found[:, :3])


def test_sparse_probes_read_their_own_latents_only():
    generator = torch.Generator().manual_seed(1)
    latents = torch.relu(torch.randn(400, 9, generator=generator))
    labels = torch.stack([latents[:, 2] > 1, latents[:, 7] > 1])
    chosen = by_scaled_difference(latents, mean_nonzero(latents), labels, 2)
    assert chosen[:, 0].tolist() == [2, 7]
    probe = fit_sparse(latents, labels, chosen)
    changed = latents.clone()
    changed[:, [i for i in range(9) if i not in chosen[0].tolist()]] = 99.0
    torch.testing.assert_close(probe.logits(latents)[0], probe.logits(changed)[0])
    plain = gather(latents, chosen)[0]
    standard = Standard.of(plain)
    reference_probe = fit_logistic(standard.apply(plain).unsqueeze(0), labels[:1])
    expected = logits(standard.apply(plain), reference_probe)[0]
    torch.testing.assert_close(probe.logits(latents)[0], expected, rtol=1e-3, atol=1e-5)


def test_main_latents_join_only_while_they_add_to_f1():
    """Two latents share a class half and half, a third is noise: the two are main, the third is not."""
    generator = torch.Generator().manual_seed(2)
    on = torch.arange(1000) % 4 == 0
    half = torch.arange(1000) % 8 == 0
    latents = torch.zeros(1000, 4)
    latents[on & half, 0] = 1.0
    latents[on & ~half, 1] = 1.0
    latents[:, 2] = (torch.rand(1000, generator=generator) < 0.3 + 0.2 * on).float()
    main, f1 = main_latents(latents, on.unsqueeze(0))
    assert f1.tolist() == [1.0]
    assert sorted(main[0].tolist()) == [0, 1]
    whole = latents.clone()
    whole[on, 3] = 1.0  # now one latent says it all
    assert main_latents(whole, on.unsqueeze(0))[0][0].tolist() == [3]


def test_the_f1_of_main_latents_is_that_of_the_ones_kept():
    """A latent that covers half of a class, and never fires elsewhere: precision 1, recall 1/2, F1 2/3."""
    on, half = torch.arange(1000) % 4 == 0, torch.arange(1000) % 8 == 0
    latents = torch.zeros(1000, 3)
    latents[on & half, 1] = 1.0
    main, f1 = main_latents(latents, on.unsqueeze(0))
    assert main[0].tolist() == [1]
    assert f1[0] == pytest.approx(2 / 3)


def test_one_hot_marks_each_value_once():
    values = np.array([4, 2, 4, 7])
    assert one_hot(values, np.array([2, 4])).tolist() == [[False, True, False, False], [True, False, True, False]]


def test_scores_are_of_the_sign_of_the_logit_whatever_the_batch():
    labels = np.array([[True, True, False, False], [True, False, True, False]])
    one = np.array([[2.0, -1.0, -3.0, 1.0], [3.0, -1.0, 1.0, -2.0]])
    found = scores_of(np.stack([one, -one]), labels)
    assert found["accuracy"].tolist() == [[0.5, 1.0], [0.5, 0.0]]
    assert found["auc"].tolist() == [[0.75, 1.0], [0.25, 0.0]]


@pytest.mark.parametrize("k", [1, 16, 128, 170])
def test_positive_definite_systems_are_solved_as_numpy_does(k):
    rng = np.random.default_rng(k)
    roots = rng.normal(size=(3, k + 1, 2 * k + 2))
    matrix, right = roots @ roots.transpose(0, 2, 1), rng.normal(size=(3, k + 1))
    found = probes._solve(torch.from_numpy(matrix), torch.from_numpy(right))
    np.testing.assert_allclose(found.numpy(), np.linalg.solve(matrix, right[..., None])[..., 0], rtol=1e-8, atol=1e-12)
