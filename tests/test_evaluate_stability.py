"""Stability: agreement of seeds, against a slow loop and with answers known by hand."""

from itertools import permutations

import numpy as np
import pytest
import torch
from evaluate_fixtures import planted_language, planted_sae, random_sae, subject_of_sae
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.metrics import stability as module
from evaluate.metrics.stability import COLUMNS, _best_matches, _matched, _unit, stability
from evaluate.subject import Subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of_sae(planted_sae(0), planted_language(n=64))


def with_peers(subject: Subject, *peers: torch.Tensor) -> Subject:
    return Subject(
        name="planted",
        dictionary=subject.dictionary,
        raw=subject.raw,
        bench=subject.bench,
        held_out=subject.held_out,
        peers=peers,
    )


def test_without_another_seed_there_is_nothing_to_say(subject):
    assert stability(subject) == {}


def test_the_same_directions_in_any_order_sign_and_length_are_the_same_dictionary(subject):
    rows = subject.dictionary.directions
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    values = stability(with_peers(subject, -3 * rows[order], rows))
    assert values == pytest.approx({"stability": 1.0, "stability_max_cosine": 1.0})


def test_two_latents_that_find_the_same_are_counted_once_by_the_matching_alone(subject):
    rows = subject.dictionary.directions.clone()
    rows[1] = rows[0]  # of the standard basis: row 1 finds nothing of its own any more
    n = len(rows)
    values = stability(with_peers(subject, rows))
    assert values["stability"] == pytest.approx((n - 1) / n)
    assert values["stability_max_cosine"] == pytest.approx((1 + (n - 1) / n) / 2)


def test_values_are_means_over_the_peers(subject):
    same, other = subject.dictionary.directions, random_sae().W_dec.detach()
    each = [stability(with_peers(subject, peer)) for peer in (same, other)]
    both = stability(with_peers(subject, same, other))
    assert both == pytest.approx({name: (each[0][name] + each[1][name]) / 2 for name in both})
    assert both.keys() == COLUMNS.keys()


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_both_agree_with_slow_loops(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    rows, others = (_unit(torch.randn(size, 4, generator=generator)) for size in (n, m))
    cosine = (rows @ others.T).abs().double().numpy()
    small, large = sorted((n, m))
    table = cosine if n <= m else cosine.T
    best = max(sum(table[i, p[i]] for i in range(small)) for p in permutations(range(large), small)) / small
    assert _matched(rows, others) == pytest.approx(best, abs=1e-6)
    expected = (np.mean(cosine.max(1)) + np.mean(cosine.max(0))) / 2
    assert _best_matches(rows, others) == pytest.approx(expected, abs=1e-6)


def test_blocks_change_nothing_and_large_dictionaries_are_not_matched(subject, monkeypatch):
    peer = random_sae().W_dec.detach()
    whole = stability(with_peers(subject, peer))
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    assert stability(with_peers(subject, peer)) == pytest.approx(whole, abs=1e-6)
    monkeypatch.setattr(module, "MOST_MATCHED", len(subject.dictionary.directions) - 1)
    assert stability(with_peers(subject, peer)).keys() == {"stability_max_cosine"}
