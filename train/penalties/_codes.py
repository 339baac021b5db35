"""The codes that sparsity penalties look at."""

from torch import Tensor

from train.recipe import StepView


def weighted_codes(step: StepView) -> Tensor:
    """[batch, d_sae], never negative: a gated SAE's gate, others' codes; times decoder norms where those are free.

    Without the norms a free decoder would grow and its codes shrink, and the penalty would mean nothing.
    """
    codes = step.forward.f if step.forward.gate is None else step.forward.gate
    return codes * step.sae.W_dec.norm(dim=1) if step.decoder == "free" else codes
