"""Gate: a gate must reconstruct alone, through a decoder that it cannot move (Rajamanoharan et al. 2024)."""

from torch import Tensor

from cache_spec.errors import UserError
from train.recipe import StepView


def gate(step: StepView) -> Tensor:
    """The mean squared error of the gate's codes. Raises UserError for an SAE that has no gate."""
    if step.forward.gate is None:
        raise UserError("the penalty gate needs an SAE with a gate; use it with --arch gated")
    sae = step.sae
    offset = sae.b_dec.detach()
    if sae.W_skip is not None:
        offset = offset + step.x @ sae.W_skip.detach()
    made = (step.forward.gate @ sae.W_dec.detach()).to(offset.dtype)
    error = step.target - (sae.spread.latents.total(made) + offset)
    return error.square().sum(-1).mean()
