"""The oracle: a dictionary that knows the ground truth, the upper bound of every metric that asks for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evaluate.rows import Rows

RIDGE = 1.0
WEAKEST = 1e-6  # a feature that the rows never show has no direction, but its latent is on all the same


@dataclass(frozen=True, kw_only=True, eq=False)
class Oracle:
    """One latent per ground-truth feature, on exactly where the feature is on, with the length of its direction.

    directions: [n_features, d_model] unit vectors. strength: [n_features], the value of a latent that is on.
    """

    directions: Tensor
    offset: Tensor
    strength: Tensor

    def encode(self, rows: Rows) -> Tensor:
        """Read the labels, not the activations: [n, n_features]."""
        assert rows.features is not None, "the oracle reads labelled rows only"
        return torch.from_numpy(rows.features).to(self.strength) * self.strength

    def decode(self, latents: Tensor) -> Tensor:
        """[n, n_features] -> [n, d_model]."""
        return latents @ self.directions + self.offset


def fit_oracle(rows: Rows) -> Oracle:
    """Each feature's direction is its additive effect: x = offset + features @ directions by ridge least squares.

    A plain class mean would give a child its parent's direction too. The codes are binary, so the oracle bounds what
    can be known (absorption, recovery, probing), not how exactly x can be rebuilt.
    """
    assert rows.features is not None
    features = torch.from_numpy(rows.features).to(rows.x.device, torch.float64)
    x = rows.x.double()
    mean_on, mean = features.mean(0), x.mean(0)
    centred = features - mean_on
    gram = centred.T @ centred + RIDGE * torch.eye(features.shape[1], dtype=torch.float64, device=x.device)
    effects = torch.cholesky_solve(centred.T @ (x - mean), torch.linalg.cholesky(gram))
    strength = effects.norm(dim=1).clamp(min=WEAKEST)
    return Oracle(
        directions=(effects / strength.unsqueeze(1)).to(rows.x.dtype),
        offset=(mean - mean_on @ effects).to(rows.x.dtype),
        strength=strength.to(rows.x.dtype),
    )
