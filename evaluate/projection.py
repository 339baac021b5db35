"""Absorption by projection: how much of a class's direction its own latents carry on a row, and how much others do."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_COSINE_FULL = 0.025
MIN_COSINE_FRACTION = 0.1
MIN_SHARE = 0.4
MAX_ABSORBERS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Absorbed:
    """What happened on each row of a class, all arrays [n].

    silent: the class's own latents are all 0. full, fraction: full absorption (0 or 1) and the absorption fraction.
    absorber: the latent with the largest projection on the class's direction besides the own ones.
    """

    silent: np.ndarray
    full: np.ndarray
    fraction: np.ndarray
    absorber: np.ndarray


def absorbed(latents: Tensor, own: Tensor, along: Tensor, cosine: Tensor, total: Tensor) -> Absorbed:
    """SAEBench 0.6 absorption (arXiv 2409.14507, 2503.09532) of rows that show a class.

    latents: [n, d_sae]. own: bool [d_sae], the latents that stand for the class. along, cosine: [d_sae], d_j . w and
    its cosine, for decoder directions d_j and the class's unit direction w. total: [n], (x - b_dec) . w, which is what
    the latents are to add up to; upstream, as far as we know, projects x, whose mean adds the same number to every row.
    full: own latents are all 0, and the latent with the largest a_j d_j . w has cosine >= 0.025 and carries >= 40 % of
    total > 0. fraction: the three largest others with cosine >= 0.1, if together >= 40 % of total, absorb
    A = min(theirs, what the own ones leave) of A + own.
    """
    silent = (latents[:, own] == 0).all(1)
    carried = latents * along
    own_part = carried[:, own].sum(1)
    others = carried.masked_fill(own, float("-inf"))
    top = others.max(1)
    full = silent & (cosine[top.indices] >= MIN_COSINE_FULL) & (total > 0) & (top.values >= MIN_SHARE * total)
    return Absorbed(
        silent=silent.double().cpu().numpy(),
        full=full.double().cpu().numpy(),
        fraction=_fraction(others, cosine, own_part, total).double().cpu().numpy(),
        absorber=top.indices.cpu().numpy(),
    )


def _fraction(others: Tensor, cosine: Tensor, own_part: Tensor, total: Tensor) -> Tensor:
    """The absorption fraction [n]: `others` [n, d_sae] is what each latent but the own ones carries."""
    aligned = others.masked_fill(cosine < MIN_COSINE_FRACTION, float("-inf")).clamp(min=0)
    taken = aligned.topk(min(MAX_ABSORBERS, aligned.shape[1]), dim=1).values.sum(1)
    left = torch.minimum(taken, (total - own_part).clamp(min=0))
    fraction = torch.where(own_part <= 0, torch.ones_like(total), left / (left + own_part).clamp(min=1e-12))
    counts = (total > 0) & (own_part < total) & (taken >= MIN_SHARE * total)
    return torch.where(counts, fraction, torch.zeros_like(fraction))
