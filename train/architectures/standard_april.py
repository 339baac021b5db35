"""ReLU and L1 with decoder rows of any length, which the penalty counts (Anthropic's update of April 2024)."""

from train.activations import ReLU
from train.recipe import Recipe


def standard_april(d_sae: int, k: int) -> Recipe:
    """No k: the coefficient of l1 decides the sparsity. dictionary_learning calls it standard_new."""
    return Recipe(
        activation=ReLU(),
        prefixes=(d_sae,),
        penalties=(("l1", 0.03),),
        uses_k=False,
        subtract_b_dec=False,
        decoder="free",
        init_entries="normal",
        init_norm=0.1,
        init_b_dec="zero",
    )
