"""The plain kernel: dense matrix products and autograd. The others are compared with it."""

from torch import Tensor

from train.recipe import Forward
from train.sae import SparseAutoencoder


def forward(sae: SparseAutoencoder, x: Tensor) -> Forward:
    """One training forward pass over rows [batch, d_model]."""
    pre = sae.pre_activations(x)
    active, smallest = sae.activation.train(pre, sae.threshold)
    f = sae.codes(pre, active)
    gate = None if sae.r_mag is None else active
    return Forward(f=f, reconstructions=sae.decode_prefixes(f, x), smallest=smallest, gate=gate)
