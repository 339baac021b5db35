"""ReLU and an L1 penalty (Bricken et al. 2023), with the settings of dictionary_learning."""

from train.activations import ReLU
from train.recipe import Recipe


def standard(d_sae: int, k: int) -> Recipe:
    """No k: the coefficient of l1 decides the sparsity."""
    return Recipe(
        activation=ReLU(),
        prefixes=(d_sae,),
        penalties=(("l1", 0.03),),
        uses_k=False,
        clip_norm=None,
        init_entries="normal",
        init_norm=0.1,
        init_b_dec="zero",
    )
