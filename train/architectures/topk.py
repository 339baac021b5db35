"""The k largest of each row, with AuxK for dead latents (Gao et al. 2024)."""

from train.activations import TopK
from train.recipe import Recipe


def topk(d_sae: int, k: int) -> Recipe:
    return Recipe(activation=TopK(k), prefixes=(d_sae,), penalties=(("auxk", 1 / 32),))
