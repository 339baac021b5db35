"""The codes of a batch as a list: what the sparse kernels work on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """Codes of a batch [batch, d_sae] of which most are 0, row by row and in each row by rising latent or not."""

    row: Tensor
    """[n] int64, never falling."""
    latent: Tensor
    """[n] int64"""
    value: Tensor
    """[n], the code."""
    starts: Tensor
    """[batch] int64: where each row begins."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """The order of entries by latent."""

    order: Tensor
    """[n] int64: places in the entries, those of one latent together, by rising row."""
    starts: Tensor
    """[d_sae] int64: where each latent begins."""
    counts: Tensor
    """[d_sae] int64"""


def by_latent(latent: Tensor, d_sae: int) -> Segments:
    """The segments of entries with these latents [n]."""
    small = torch.int16 if d_sae <= 2**15 else torch.int32  # sorts faster than int64
    order = latent.to(small).sort(stable=True).indices
    counts = torch.bincount(latent, minlength=d_sae)
    return Segments(order=order, starts=counts.cumsum(0) - counts, counts=counts)


def row_starts(row: Tensor, n_rows: int) -> Tensor:
    """[n_rows] int64: where each row begins in never falling row numbers [n]."""
    return torch.searchsorted(row, torch.arange(n_rows, device=row.device))
