"""L1: the mean over rows of the sum of the codes, warmed up."""

from torch import Tensor

from train.penalties._codes import weighted_codes
from train.recipe import StepView


def l1(step: StepView) -> Tensor:
    """Of a gated SAE the gate's codes; times the decoder norms where those are free."""
    return step.sparsity_scale * step.sae.spread.latents.total(weighted_codes(step).sum(dim=-1).mean())
