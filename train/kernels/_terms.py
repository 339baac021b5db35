"""The penalties auxk and l0 and the thresholds of JumpReLU, with gradients by hand: what train/penalties/ says."""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.activations import JumpReLU, rectangle
from train.kernels._choose import Chosen
from train.kernels._update import Slices
from train.step import TrainRun


@dataclass(frozen=True, kw_only=True, eq=False)
class Auxiliary:
    """What auxk adds: to the loss, and to the gradients of the dead latents [n_dead], rising."""

    loss: Tensor
    dead: Tensor
    W_enc: Tensor
    """[n_dead, d_model]"""
    W_dec: Tensor
    """[n_dead, d_out]"""
    b_enc: Tensor
    """[n_dead]"""

    def add_to(self, slices: list[Slices], b_enc: Tensor) -> None:
        """Add the gradients to those of all latents, in place."""
        b_enc[self.dead] += self.b_enc
        for each in slices:
            first, last = torch.searchsorted(self.dead, self.dead.new_tensor([each.start, each.end])).tolist()
            places = self.dead[first:last] - each.start
            each.W_enc[places] += self.W_enc[first:last]
            each.W_dec[places] += self.W_dec[first:last]


def auxiliary(run: TrainRun, dead: Tensor, centred: Tensor, residual: Tensor, coefficient: float) -> Auxiliary:
    """AuxK on the dead latents alone: three products as wide as these are many; see train/penalties/auxk.py."""
    sae = run.sae
    W_enc, W_dec = sae.W_enc.t()[dead], sae.W_dec[dead]
    codes = torch.addmm(sae.b_enc[dead], centred, W_enc.t()).relu_()
    n_used = run.config.aux_k or sae.d_out // 2
    if len(dead) > n_used:
        largest, latents = codes.topk(n_used, dim=-1, sorted=False)
        codes = torch.zeros_like(codes).scatter_(-1, latents, largest)
    error = torch.addmm(residual, codes, W_dec, alpha=-1)
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    varies = variance > 0
    ratio = torch.where(varies, error.square().sum(-1).mean() / variance, 0.0)
    # where the ratio is no number the loss has 0 in its place, which has no gradient; infinity counts as a constant
    slope = torch.where(varies & ratio.isfinite(), -2.0 * coefficient / (len(residual) * variance), 0.0)
    pulled = error.mul_(slope)  # the gradient in the reconstruction
    of_codes = torch.where(codes > 0, pulled @ W_dec.t(), 0.0)
    return Auxiliary(
        loss=coefficient * torch.nan_to_num(ratio),
        dead=dead,
        W_enc=of_codes.t() @ centred,
        W_dec=codes.t() @ pulled,
        b_enc=of_codes.sum(0),
    )


def threshold_gradient(run: TrainRun, chosen: Chosen, of_codes: Tensor) -> Tensor:
    """[d_sae]: the straight-through gradient of the squared error; see train/activations.py.

    of_codes [n] is the gradient in each entry's code, also where the code is off.
    """
    activation, threshold = _jumprelu(run)
    latent = chosen.entries.latent
    near = rectangle(chosen.pre, threshold[latent], activation.bandwidth)
    total = torch.bincount(latent, weights=near * of_codes, minlength=len(threshold)).to(of_codes.dtype)
    return -(threshold / activation.bandwidth) * total


def l0_term(run: TrainRun, chosen: Chosen, n_on: Tensor, n_rows: int, coefficient: float) -> tuple[Tensor, Tensor]:
    """The penalty l0 (a scalar) and its gradient in the thresholds [d_sae]; see train/penalties/l0.py.

    n_on [d_sae] counts each latent's codes that are on. The window looks at codes, so where it reaches down to 0 all
    codes that are off are in it.
    """
    activation, threshold = _jumprelu(run)
    latent, value = chosen.entries.latent, chosen.entries.value
    near = rectangle(value, threshold[latent], activation.bandwidth) * (value > 0)
    n_near = torch.bincount(latent, weights=near, minlength=len(threshold)).to(value.dtype)
    n_near += torch.where(threshold < activation.bandwidth / 2, n_rows - n_on, 0)
    excess = n_on.sum().to(value.dtype) / (n_rows * run.config.k) - 1
    scale = coefficient * run.sparsity_scale
    gradient = -(2 * scale * excess / run.config.k) * n_near / (n_rows * activation.bandwidth)
    return scale * excess.square(), gradient.to(value.dtype)


def _jumprelu(run: TrainRun) -> tuple[JumpReLU, Tensor]:
    activation, threshold = run.sae.activation, run.sae.threshold
    assert isinstance(activation, JumpReLU)
    assert threshold is not None
    return activation, threshold.detach()
