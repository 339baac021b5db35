"""L1: the mean over rows of the sum of the codes, warmed up."""

from torch import Tensor

from train.recipe import StepView


def l1(step: StepView) -> Tensor:
    return step.sparsity_scale * step.forward.f.sum(dim=-1).mean()  # codes are never negative
