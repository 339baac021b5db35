"""The parts of the loss that every architecture may have."""

import torch
from torch import Tensor

from train.sae import SparseAutoencoder


def nested_error(reconstructions: list[Tensor], target: Tensor) -> Tensor:
    """Squared error: summed over d_model, averaged over rows and prefixes, each prefix weighted by 1 / their number.

    The weight is dictionary_learning's (1/25 of the sum for five prefixes); it decides how much AuxK counts.
    """
    errors = [(target - reconstruction).square().sum() for reconstruction in reconstructions]
    return torch.stack(errors).sum() / (target.shape[0] * len(errors) ** 2)


def inconsistency(sae: SparseAutoencoder, f: Tensor, twin: Tensor, paired: Tensor) -> Tensor:
    """Squared distance between the codes [batch, d_sae] and those of the rows' other view, averaged over paired rows.

    0 if no row is paired. The twins are a batch of their own to an activation that looks at the whole batch.
    """
    pre = sae.pre_activations(twin)
    others = sae.codes(pre, sae.activation.train(pre, sae.threshold, sae.spread)[0])
    distances = sae.spread.latents.total((f - others).square().sum(-1))
    n_paired = sae.spread.rows.total(paired.sum()).clamp(min=1)
    return torch.where(paired, distances, 0.0).sum() * sae.spread.rows.size / n_paired
