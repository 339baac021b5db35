"""Hedging on latents built by hand that write a correlated feature along with their own."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from evaluate_fixtures import planted_language, subject_of
from torch import Tensor

from evaluate.language import Language
from evaluate.metrics.hedging import hedging
from evaluate.oracle import fit_oracle
from evaluate.rows import Rows
from evaluate.truth import Truth

NAMES = ("A", "B", "part of A", "alone", "rare")


def correlated_rows(n: int = 4000, seed: int = 0) -> Rows:
    """A and B are on together more often than apart, a part of A is on only where A is, and one feature is alone."""
    generator = np.random.default_rng(seed)
    features = np.zeros((n, 5), dtype=bool)
    features[:, 0] = generator.random(n) < 0.3
    features[:, 1] = np.where(features[:, 0], generator.random(n) < 0.7, generator.random(n) < 0.2)
    features[:, 2] = features[:, 0] & (generator.random(n) < 0.5)
    features[:, 3] = generator.random(n) < 0.3
    features[:3, 4] = True
    x = features @ np.diag([2.0, 3.0, 1.0, 1.0, 1.0]) + 0.01 * generator.standard_normal((n, 5))
    return Rows(x=torch.from_numpy(x).float(), features=features)


@pytest.fixture(scope="module")
def language() -> Language:
    rows = correlated_rows()
    return replace(planted_language(500), even=rows, fit=rows, test=rows, relations=(), feature_names=NAMES)


@dataclass(frozen=True, eq=False)
class Planted:
    """Latents that are on exactly where their features are, with any decoder [5, 5]."""

    directions: Tensor
    offset: Tensor

    def encode(self, rows: Rows) -> Tensor:
        assert rows.features is not None
        return torch.from_numpy(rows.features).float() * torch.tensor([2.0, 3.0, 1.0, 1.0, 1.0])

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.directions + self.offset


def planted(*leaks: tuple[int, int, float]) -> Planted:
    """(latent, feature, how much of the feature's effect the latent writes) on top of its own feature."""
    directions, strength = torch.eye(5), [2.0, 3.0, 1.0, 1.0, 1.0]
    for latent, feature, share in leaks:
        directions[latent, feature] = share * strength[feature] / strength[latent]
    return Planted(directions, torch.zeros(5))


def test_pairs_are_correlated_features_of_which_none_belongs_to_the_other():
    rows = correlated_rows()
    truth = Truth.of(rows, NAMES)
    # The part of A is correlated with A, and belongs to it; with B it goes together as A does.
    assert truth.pairs.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert rows.features is not None
    correlation = np.corrcoef(rows.features[:, :4].T.astype(float))
    assert correlation[0, 1] > 0.2
    assert correlation[0, 2] > 0.2
    assert np.abs(correlation[3, :3]).max() < 0.2


def test_the_oracle_and_separate_latents_hedge_nothing(language):
    for dictionary in (fit_oracle(language.even), planted()):
        values = hedging(subject_of(dictionary, language))
        assert values["hedging"] == pytest.approx(0.0, abs=0.01)
        assert values["n_hedging_pairs"] == 4.0


@pytest.mark.parametrize("share", [0.5, -0.5, 1.0])
def test_planted_hedging_is_found_with_its_sign(language, share):
    """One pair of four: the latent of A writes a share of B."""
    values = hedging(subject_of(planted((0, 1, share)), language))
    assert values["hedging"] == pytest.approx(abs(share) / 4, abs=0.02)
    assert values["hedging_signed"] == pytest.approx(share / 4, abs=0.02)


def test_what_a_feature_implies_is_not_hedging(language):
    """The latent of the part of A may write A: that is absorption, and measured elsewhere."""
    assert hedging(subject_of(planted((2, 0, 1.0)), language))["hedging"] == pytest.approx(0.0, abs=0.01)


def test_without_latents_for_half_of_the_pairs_there_is_no_number(language):
    class Blind(Planted):
        def encode(self, rows: Rows) -> Tensor:
            return super().encode(rows) * torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])

    values = hedging(subject_of(Blind(torch.eye(5), torch.zeros(5)), language))
    assert "hedging" not in values
    assert values["n_hedging_pairs"] == 0.0


def test_factors_are_those_of_least_squares(language):
    truth, generator = language.truth, torch.Generator().manual_seed(0)
    vector = torch.randn(5, generator=generator)
    found = truth.written(vector, own=2, other=1)
    columns = truth.effects[[2, 1, 0]].numpy().T  # what the part of A implies stands beside it
    expected = np.linalg.lstsq(columns, vector.numpy(), rcond=None)[0]
    assert (found.own, found.other) == pytest.approx((expected[0], expected[1]))
