"""AuxK: dead latents learn to reconstruct what the living ones leave (Gao et al. 2024)."""

import torch
from torch import Tensor

from train.parallel.exchange import largest_in_rows
from train.recipe import StepView


def auxk(step: StepView) -> Tensor:
    """The squared error of the dead latents' best d_out / 2 (or aux_k) on the residual, over the residual's variance.

    Only the dead latents are encoded again, so it costs what they weigh; 0 if there are none,
    or if the residual is the same in all rows.
    """
    residual = (step.target - step.forward.reconstructions[-1]).detach()
    if step.dead is None:
        return residual.new_zeros(())
    codes = torch.relu(step.sae.pre_activations(step.x, step.dead))  # [batch, n_dead]
    n_used, spread = step.aux_k or step.sae.d_out // 2, step.sae.spread
    if spread.latents.count(len(step.dead), codes) > n_used:
        largest, latents = largest_in_rows(codes, n_used, spread.latents)
        codes = torch.zeros_like(codes).scatter(-1, latents, largest)
    made = spread.latents.total((codes @ step.sae.W_dec[step.dead]).to(residual.dtype))
    error = (residual - made).square().sum(-1).mean()
    variance = spread.rows.mean((residual - spread.rows.mean(residual.mean(0))).square().sum(-1).mean())
    varies = variance > 0  # not in a batch of one row: a division by 0 would make the gradient NaN
    return torch.where(varies, torch.nan_to_num(error / torch.where(varies, variance, 1.0)), 0.0)
