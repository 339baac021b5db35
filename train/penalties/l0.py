"""L0: the squared relative distance of the mean number of active latents from k, warmed up."""

from typing import Any

import torch
from torch import Tensor

from cache_spec.errors import UserError
from train.activations import JumpReLU, rectangle
from train.recipe import StepView


def l0(step: StepView) -> Tensor:
    """Raises UserError for another activation than JumpReLU: only its threshold can learn from a count."""
    activation = step.sae.activation
    if not isinstance(activation, JumpReLU):
        raise UserError("the penalty l0 needs the thresholds of jumprelu; use --penalty l1 with other architectures")
    count: Any = _Count.apply(step.forward.f, step.sae.threshold, activation.bandwidth)
    count = step.sae.spread.rows.mean(step.sae.spread.latents.total(count))
    return step.sparsity_scale * (count / step.k - 1).square()


class _Count(torch.autograd.Function):
    """Mean number of active latents a row; the threshold's gradient is -(1 / bandwidth) * rectangle.

    It looks at the codes, as dictionary_learning does, so only the half of the rectangle above the threshold counts.
    """

    @staticmethod
    def forward(ctx: Any, f: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(f, threshold)
        ctx.bandwidth = bandwidth
        return (f > threshold).sum() / f.new_tensor(f.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        f, threshold = ctx.saved_tensors
        near = rectangle(f, threshold, ctx.bandwidth).sum(0) / f.shape[0]
        return None, -grad * near / ctx.bandwidth, None
