"""ReLU and a penalty on the codes to a power that falls from 1 to 0.2 (Karvonen et al. 2024)."""

from train.activations import ReLU
from train.recipe import Recipe


def p_anneal(d_sae: int, k: int) -> Recipe:
    """No k: the coefficient of lp decides the sparsity. Settings of dictionary_learning."""
    return Recipe(
        activation=ReLU(),
        prefixes=(d_sae,),
        penalties=(("lp", 0.015),),
        uses_k=False,
        clip_norm=None,
        init_entries="normal",
        init_norm=0.1,
        init_b_dec="zero",
        p_end=0.2,
    )
