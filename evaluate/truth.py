"""Truth: the directions of the ground-truth features, which of them go together, and what a latent writes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluate.oracle import fit_oracle
from evaluate.rows import Rows

ALWAYS = 0.95  # a feature that is on in this share of another's rows belongs to it: its parent, or its token
CORRELATED = 0.2  # least correlation of a pair that hedging is measured on
MIN_ROWS = 20  # of each feature of such a pair


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """What a vector holds of two features: the factors of their effects, 1 where the whole effect is in it."""

    own: float
    other: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What the labels of an even sample of tokens say.

    number: feature name -> its number. effects: [n_features, d_model] float64, what each adds to an activation (the
    oracle's direction times its strength). implied: bool [n_features, n_features], the second is on whenever the first
    is. pairs: [n_pairs, 2], correlated features of which neither implies the other.
    """

    number: dict[str, int]
    effects: Tensor
    implied: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(cls, rows: Rows, names: Sequence[str]) -> "Truth":
        """Read the labelled rows."""
        assert rows.features is not None
        oracle = fit_oracle(rows)
        features = rows.features.astype(np.float64)
        together, n_on = features.T @ features, features.sum(0)
        share = together / np.maximum(n_on, 1)[:, None]  # [i, j]: P(j | i)
        often = n_on >= MIN_ROWS
        mean = n_on / len(features)
        spread = np.sqrt(mean * (1 - mean))
        correlation = (together / len(features) - np.outer(mean, mean)) / np.maximum(np.outer(spread, spread), 1e-12)
        nested = np.maximum(share, share.T) >= ALWAYS
        pairs = (correlation >= CORRELATED) & ~nested & often[:, None] & often[None, :]
        return cls(
            number={name: i for i, name in enumerate(names)},
            effects=(oracle.directions * oracle.strength.unsqueeze(1)).double(),
            implied=(share >= ALWAYS) & ~np.eye(len(names), dtype=bool),
            pairs=np.argwhere(pairs),
        )

    def written(self, vector: Tensor, own: int, other: int) -> Written:
        """Least squares of [d_model] on the effects of a feature, of another, and of all that the first implies.

        Not on the whole dictionary: it has more features than dimensions, so the answer would be the choice of a ridge,
        and even a perfect latent would hold a little of everything. What the first implies stands beside it because a
        latent of a noun may rightly be asked how much of the noun's letter it holds, and not how much of its kind.
        """
        beside = [int(i) for i in np.flatnonzero(self.implied[own]) if i != other]
        columns = self.effects[[own, other, *beside]].T
        factors = torch.linalg.pinv(columns) @ vector.to(columns)
        return Written(own=float(factors[0]), other=float(factors[1]))
