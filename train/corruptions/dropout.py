"""Dropout of activations on every row, a control for masking."""

import torch
from torch import Generator, Tensor

from cache_spec.errors import UserError


def dropout(x: Tensor, strength: float, generator: Generator) -> Tensor:
    """Set each entry of [batch, d_model] to 0 with probability `strength` and scale the rest to keep the mean.

    Raises UserError for a probability that is not below 1.
    """
    if not 0 <= strength < 1:
        raise UserError(f"dropout={strength} is not a probability below 1")
    keep = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) >= strength
    return torch.where(keep, x / (1 - strength), 0.0)


def strength_for(displacement: float) -> float:
    """The strength that moves rows by `displacement` = mean squared distance over mean squared length.

    A row x moves by strength / (1 - strength) * ||x||^2 on average.
    """
    return displacement / (1 + displacement)
