"""BatchTopK whose first latents must also reconstruct alone (Bussmann et al. 2025)."""

from itertools import accumulate

from cache_spec.errors import UserError
from train.activations import BatchTopK
from train.recipe import Recipe

SHARES = (32, 16, 8, 4)  # group sizes are d_sae divided by these, and the rest


def matryoshka(d_sae: int, k: int) -> Recipe:
    """Five nested prefixes; 4096 latents make 128, 384, 896, 1920, 4096. Raises UserError below 32 latents."""
    if d_sae < SHARES[0]:
        raise UserError(f"--d-sae {d_sae} is too small for five nested prefixes; matryoshka needs at least {SHARES[0]}")
    prefixes = (*accumulate(d_sae // share for share in SHARES), d_sae)
    return Recipe(activation=BatchTopK(k), prefixes=prefixes, penalties=(("auxk", 1 / 32),))
