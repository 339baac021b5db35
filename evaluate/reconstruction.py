"""Reconstruction: what a dictionary makes of rows, summed up without keeping latents or reconstructions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evaluate.rows import Rows
from evaluate.subject import Dictionary, chunks


@dataclass(frozen=True, kw_only=True, eq=False)
class Totals:
    """Per row: squared error and squared distance to the mean, [n]. Per latent: rows it fires on, [d_sae]."""

    error: Tensor
    spread: Tensor
    n_firing: Tensor
    cosine: float
    norm_ratio: float

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.error)

    @property
    def l0(self) -> float:
        """Latents on per row."""
        return float(self.n_firing.sum()) / self.n

    @property
    def explained_variance(self) -> float:
        """Pooled: 1 - sum of errors / sum of squared distances to the mean."""
        return 1 - float(self.error.sum() / self.spread.sum())

    def explained_variance_of(self, x: Tensor, kept: Tensor) -> float:
        """The same over some of the rows, about their own mean: x [n, d_model] as measured, kept bool [n]."""
        rows = x[kept].double()
        return 1 - float(self.error[kept].sum() / (rows - rows.mean(0)).square().sum())


def totals(dictionary: Dictionary, rows: Rows) -> Totals:
    """Encode and decode all rows, a chunk at a time."""
    mean = rows.x.mean(0)
    error, spread, cosine, ratio = [], [], [], []
    n_firing = torch.zeros(len(dictionary.directions), dtype=torch.long, device=rows.x.device)
    for part in chunks(rows):
        latents = dictionary.encode(part)
        reconstruction = dictionary.decode(latents)
        n_firing += (latents != 0).sum(0)
        error.append((part.x - reconstruction).square().sum(1).double())
        spread.append((part.x - mean).square().sum(1).double())
        cosine.append(torch.nn.functional.cosine_similarity(part.x, reconstruction, dim=1).double())
        ratio.append((reconstruction.norm(dim=1) / part.x.norm(dim=1).clamp(min=1e-12)).double())
    return Totals(
        error=torch.cat(error),
        spread=torch.cat(spread),
        n_firing=n_firing,
        cosine=float(torch.cat(cosine).mean()),
        norm_ratio=float(torch.cat(ratio).mean()),
    )
