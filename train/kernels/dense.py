"""The plain kernel: dense matrix products and autograd. The others are compared with it."""

from torch import Tensor

from train.recipe import Forward
from train.sae import SparseAutoencoder


def forward(sae: SparseAutoencoder, x: Tensor) -> Forward:
    """One training forward pass over rows [batch, d_model]."""
    f, smallest = sae.activation.train(sae.pre_activations(x), sae.threshold)
    return Forward(f=f, reconstructions=sae.decode_prefixes(f), smallest=smallest)
