"""Gaussian noise on every row, a control for masking."""

import torch
from torch import Generator, Tensor

from cache_spec.errors import UserError

MOST = 1000.0  # times the length of a row; beyond there is nothing but noise


def gaussian(x: Tensor, strength: float, generator: Generator) -> Tensor:
    """Add noise whose root mean square length is `strength` times that of a clean row.

    Rows [batch, d_model] come normalised to mean squared length 1, so each dimension gets strength / sqrt(d_model).
    Raises UserError for a strength that is negative or absurd.
    """
    if not 0 <= strength <= MOST:
        raise UserError(
            f"gaussian={strength:g} is not 0 to {MOST:g}; give the length of the noise as a share of a row's"
        )
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return torch.add(x, noise, alpha=strength / x.shape[-1] ** 0.5)


def strength_for(displacement: float) -> float:
    """The strength that moves rows by `displacement` = mean squared distance over mean squared length."""
    return displacement**0.5
