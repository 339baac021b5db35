"""Lp: the mean over rows of the sum of the codes to a power p, which falls from 1 (Karvonen et al. 2024), warmed up."""

from torch import Tensor

from train.penalties._codes import weighted_codes
from train.recipe import StepView

NEAR_ZERO = 1e-4  # rows have length 1 on average: such a code is a hundred-millionth of their energy


def lp(step: StepView) -> Tensor:
    """With p = 1 it is l1."""
    total = step.sae.spread.latents.total(mean_power(weighted_codes(step), step.p))
    return step.sparsity_scale * step.p_rescale * total


def mean_power(codes: Tensor, p: float) -> Tensor:
    """Mean over rows [batch, d_sae] of the sum of codes ** p.

    Written as f (f + 1e-4) ** (p - 1): the slope of f ** p has no bound at 0, so one code that is nearly zero could
    throw its latent far away, and in float32 rounding would decide which. With 1e-6 it still did: 50 steps left those
    in float64 by 5e-5, with 1e-4 by 3e-7.
    """
    powers = codes if p == 1 else codes * (codes + NEAR_ZERO).pow(p - 1)
    return powers.sum(dim=-1).mean()
