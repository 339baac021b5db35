"""A gate that says which latents are on, and a path of its own for how much (Rajamanoharan et al. 2024)."""

from train.activations import ReLU
from train.recipe import Recipe


def gated(d_sae: int, k: int) -> Recipe:
    """No k: the coefficient of l1 decides the sparsity. Settings of dictionary_learning."""
    return Recipe(
        activation=ReLU(),
        prefixes=(d_sae,),
        penalties=(("l1", 0.04), ("gate", 1.0)),
        gated=True,
        uses_k=False,
        betas=(0.0, 0.999),
        clip_norm=None,
        init_entries="normal",
        init_b_dec="zero",
    )
