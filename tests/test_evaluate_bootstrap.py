"""The bootstrap of AUC: against a slow loop, and against the formula of Hanley and McNeil."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from evaluate.bootstrap import resampled_auc, resampled_counts, right_side


def scored(n: int, seed: int, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n] of two classes of equal size whose means are `shift` apart, and bool [n]."""
    on = np.arange(n) % 2 == 0
    return np.random.default_rng(seed).standard_normal(n) + shift * on, on


@given(scores=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=4, max_size=30), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_share_on_the_right_side_is_counted_pair_by_pair(scores, seed):
    values = np.array(scores)
    on = np.random.default_rng(seed).random(len(values)) < 0.5
    on[:2] = [True, False]
    share = right_side(values[None], on)[0]
    for i, value in enumerate(values):
        others = values[on != on[i]]
        beaten = others < value if on[i] else others > value
        assert share[i] == pytest.approx(beaten.mean() + (others == value).mean() / 2)
    assert share[on].mean() == pytest.approx(roc_auc_score(on, values))


def test_every_resample_has_as_many_rows_of_each_class_as_there_are():
    labels = np.array([np.arange(60) % 4 == c for c in range(3)])  # a quarter of the rows is in no class
    counts = resampled_counts(labels, np.random.default_rng(0), 200).numpy()
    for group in (*labels, ~labels.any(0)):
        assert (counts[:, group].sum(1) == 15).all()
    assert counts.mean(0) == pytest.approx(np.ones(60), abs=0.35)
    assert (counts == resampled_counts(labels, np.random.default_rng(0), 200).numpy()).all()


def test_rows_drawn_as_often_as_they_are_there_give_the_auc_itself():
    scores = np.stack([scored(80, seed)[0] for seed in range(6)]).reshape(2, 3, 80)
    labels = np.stack([np.arange(80) % 2 == 0, np.arange(80) % 5 == 0, np.arange(80) < 30])
    plain = [roc_auc_score(labels[c], scores[s, c]) for s in range(2) for c in range(3)]
    assert resampled_auc(scores, labels, torch.ones(1, 80))[0] == pytest.approx(np.mean(plain))


def test_resamples_are_those_of_a_slow_loop_to_first_order():
    """The loop repeats rows and asks scikit-learn; what is left out is of the order of 1 / rows."""
    on = np.arange(400) % 2 == 0
    scores = np.stack([scored(400, seed)[0] for seed in range(2)])[:, None]
    counts = resampled_counts(on[None], np.random.default_rng(1), 300)
    loop = []
    for row in counts.numpy().astype(int):
        again = np.repeat(np.arange(400), row)
        loop.append(np.mean([roc_auc_score(on[again], values[0][again]) for values in scores]))
    found = resampled_auc(scores, on[None], counts)
    assert np.abs(found - loop).max() < 0.012
    assert np.corrcoef(found, loop)[0, 1] > 0.99
    assert found.std() == pytest.approx(np.std(loop), rel=0.03)


def test_the_spread_is_the_standard_error_of_hanley_and_mcneil():
    """For scores of equal spread the formula of 1982 is within a few parts in a hundred; AUC about .76, 150 of each."""
    scores, on = scored(300, 3)
    area, n = roc_auc_score(on, scores), 150
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + (n - 1) * (q1 + q2 - 2 * area**2)) / n**2)
    counts = resampled_counts(on[None], np.random.default_rng(0), 4000)
    assert resampled_auc(scores[None, None], on[None], counts).std() == pytest.approx(error, rel=0.08)


def test_the_same_resamples_cancel_what_two_probes_share():
    scores, on = scored(300, 5)
    nearly = scores + 0.1 * np.random.default_rng(6).standard_normal(300)
    counts = resampled_counts(on[None], np.random.default_rng(0))
    one, other = (resampled_auc(values[None, None], on[None], counts) for values in (scores, nearly))
    assert (one - other).std() < 0.2 * one.std()


def test_a_probe_that_is_always_right_has_no_spread():
    on = np.arange(40) % 2 == 0
    counts = resampled_counts(on[None], np.random.default_rng(0), 50)
    assert resampled_auc(on.astype(float)[None, None], on[None], counts) == pytest.approx(np.ones(50))
