"""A trained threshold per latent and a penalty on L0 (Rajamanoharan et al. 2024), as dictionary_learning trains it."""

from train.activations import JumpReLU
from train.recipe import Recipe


def jumprelu(d_sae: int, k: int) -> Recipe:
    """Here k is the L0 that the penalty draws towards."""
    return Recipe(
        activation=JumpReLU(),
        prefixes=(d_sae,),
        penalties=(("l0", 1.0),),
        subtract_b_dec=False,
        betas=(0.0, 0.999),
        init_threshold=0.001,
        init_b_dec="zero",
    )
