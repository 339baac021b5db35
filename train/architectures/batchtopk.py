"""The k * batch largest of a batch, with AuxK for dead latents (Bussmann et al. 2024)."""

from train.activations import BatchTopK
from train.recipe import Recipe


def batchtopk(d_sae: int, k: int) -> Recipe:
    return Recipe(activation=BatchTopK(k), prefixes=(d_sae,), penalties=(("auxk", 1 / 32),))
