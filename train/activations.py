"""Activations: which pre-activations stay, in training and in use. Small final classes with one interface.

`train` gives the codes [batch, d_sae] with gradients and, where a running threshold is kept, the smallest
active value of the batch. `infer` gives the codes of the finished SAE, each row on its own. Where rows or latents
are spread over processes, "the k largest" and "the smallest" are those of all processes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from train.parallel.axis import ALONE, Spread
from train.parallel.exchange import largest_in_rows, nth_largest

FIXED, RUNNING, TRAINED = "none", "running", "trained"  # what becomes of an SAE's threshold


class Activation(Protocol):
    """Takes pre-activations [batch, d_sae] and a threshold (scalar or [d_sae]), gives codes [batch, d_sae]."""

    @property
    def threshold(self) -> str: ...

    def train(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> tuple[Tensor, Tensor | None]: ...

    def infer(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> Tensor: ...


@dataclass(frozen=True)
class ReLU:
    """Keeps what is positive."""

    threshold: str = FIXED

    def train(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> tuple[Tensor, None]:
        return torch.relu(pre), None

    def infer(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> Tensor:
        return torch.relu(pre)


@dataclass(frozen=True)
class TopK:
    """Keeps the k largest of each row, as far as they are positive."""

    k: int
    threshold: str = FIXED

    def train(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> tuple[Tensor, None]:
        return self.infer(pre, threshold, spread), None

    def infer(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> Tensor:
        largest, latents = largest_in_rows(pre, self.k, spread.latents, alike=True)
        return torch.zeros_like(pre).scatter(-1, latents, torch.relu(largest))


@dataclass(frozen=True)
class BatchTopK:
    """Keeps the k * batch largest of the whole batch, as far as they are positive; in use, what exceeds the threshold.

    Values that tie with the last one kept are kept too. Bussmann et al. 2024.
    """

    k: int
    threshold: str = RUNNING

    def train(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> tuple[Tensor, Tensor]:
        n_kept = self.k * pre.shape[0] * spread.rows.size
        if spread.size > 1:
            return _keep_spread(pre, n_kept, spread)
        return _keep_on_cpu(pre, n_kept) if pre.device.type == "cpu" else _keep_anywhere(pre, n_kept)

    def infer(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> Tensor:
        return Threshold().infer(pre, threshold)


@dataclass(frozen=True)
class JumpReLU:
    """Keeps what exceeds a trained threshold per latent. Rajamanoharan et al. 2024.

    The step has no gradient; a rectangle of width `bandwidth` around the threshold stands in for it.
    """

    bandwidth: float = 0.001
    threshold: str = TRAINED

    def train(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> tuple[Tensor, None]:
        f: Any = _Jump.apply(pre, threshold, self.bandwidth)
        return f, None

    def infer(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> Tensor:
        return Threshold().infer(pre, threshold)


@dataclass(frozen=True)
class Threshold:
    """Keeps what is positive and exceeds a given threshold. For use, not for training."""

    threshold: str = RUNNING

    def train(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> tuple[Tensor, None]:
        return self.infer(pre, threshold, spread), None

    def infer(self, pre: Tensor, threshold: Tensor | None, spread: Spread = ALONE) -> Tensor:
        assert threshold is not None
        return torch.where(pre > threshold, torch.relu(pre), 0.0)


def _keep_anywhere(pre: Tensor, n_kept: int) -> tuple[Tensor, Tensor]:
    """The `n_kept` largest of all, as far as they are positive, and the smallest of them; no wait for the device."""
    bound = pre.detach().flatten().topk(n_kept, sorted=False).values.amin()
    f = torch.where(pre < bound, 0.0, torch.relu(pre))  # so that NaN stays NaN, for the loss to show
    return f, _smallest_positive(f)


def _keep_on_cpu(pre: Tensor, n_kept: int) -> tuple[Tensor, Tensor]:
    """The same, several times faster."""
    bound = kth_largest(pre.detach(), n_kept)
    if bound <= 0:  # fewer are positive
        f = torch.relu(pre)
        return f, _smallest_positive(f)
    below = torch.nextafter(bound, torch.zeros_like(bound)).item()  # `threshold` keeps what is greater
    return functional.threshold(pre, below, 0.0), bound


def _keep_spread(pre: Tensor, n_kept: int, spread: Spread) -> tuple[Tensor, Tensor]:
    """The same, of the pre-activations of all processes."""
    axis = spread.rows if spread.latents.size == 1 else spread.latents
    bound = nth_largest(pre.detach(), n_kept, axis, kth_largest)
    f = torch.where(pre < bound, 0.0, torch.relu(pre))
    return f, bound if bound > 0 else axis.least(_smallest_positive(f.detach()))


def kth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of all values, exactly (a scalar).

    It looks first at the maxima of blocks: the n-th largest maximum is a lower bound, since n values reach it, so
    only the blocks whose maximum reaches it have to be opened. NaN counts as the largest, as where values are sorted.
    """
    flat = values.reshape(-1)
    block = 32
    while block > 1 and (flat.numel() % block or 2 * n * block > flat.numel()):
        block //= 2
    if block >= 4:
        blocks = flat.view(block, -1)
        maxima = blocks.amax(0)
        lower = maxima.kthvalue(maxima.numel() - n + 1).values
        opened = blocks[:, (~(maxima < lower)).nonzero().squeeze(1)]
        flat = opened[~(opened < lower)]
    return flat.kthvalue(flat.numel() - n + 1).values


def _smallest_positive(f: Tensor) -> Tensor:
    return torch.where(f > 0, f, torch.inf).amin()


def rectangle(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where x is within half a bandwidth of the threshold, else 0."""
    return ((x - threshold).abs() < bandwidth / 2).to(x.dtype)


class _Jump(torch.autograd.Function):
    """x * 1[x > threshold]; the threshold's gradient is -(threshold / bandwidth) * rectangle."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre <= threshold, 0.0, pre)  # so that NaN stays NaN, for the loss to show

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, threshold = ctx.saved_tensors
        near = rectangle(pre, threshold, ctx.bandwidth)
        return (
            torch.where(pre > threshold, grad, 0.0),
            -(threshold / ctx.bandwidth) * (near * grad).sum(0),
            None,
        )
