"""Thresholds set by count: the one with which an SAE has a wanted mean L0 on given rows."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.activations import RUNNING
from train.loader import MixedBatchLoader
from train.sae import SparseAutoencoder

N_ROWS = 16384  # with k = 20 a third of a million active latents, so the count's own noise is a few in a thousand


def threshold_for_l0(sae: SparseAutoencoder, batches: Iterable[Tensor], k: float, n_rows: int) -> Tensor:
    """The SAE's own thresholds, all moved by one amount, so that its mean L0 on the rows equals k.

    `batches` are rows [batch, d_model], `n_rows` in all. Of all positive pre-activations the k n that exceed their
    threshold by most (or miss it by least) stay on; for an SAE with one threshold for all latents that is the
    (k n)-th largest pre-activation. The amount lies halfway between the last one kept and the next. Fewer than k n
    positive ones: all stay on.
    """
    assert sae.threshold is not None
    n_active, axis = round(k * n_rows), sae.spread.latents
    largest = sae.b_enc.new_empty(0)
    with torch.no_grad():
        for x in batches:
            pre = sae.pre_activations(x)
            margins = (pre - sae.threshold)[pre > 0]
            pool = torch.cat([largest, margins])
            largest = pool.topk(min(n_active + 1, len(pool))).values
        if axis.size > 1:
            padded = functional.pad(largest, (0, n_active + 1 - len(largest)), value=-torch.inf)
            pool = axis.gather(padded).flatten()
            largest = pool[pool > -torch.inf]
            largest = largest.topk(min(n_active + 1, len(largest))).values
        if not len(largest):  # nothing is ever on: no threshold changes that
            return sae.threshold.detach().clone()
        moved = largest.min() - 1 if len(largest) <= n_active else (largest[n_active - 1] + largest[n_active]) / 2
        return sae.threshold.detach() + moved


def calibrate(sae: SparseAutoencoder, k: int, rows: list[Tensor], norm_factor: float) -> dict[str, Any]:
    """Replace a running threshold by the one whose mean L0 on clean rows is k; what was and what is, as facts.

    `rows` are batches in training units; the thresholds in the facts are in the units of the saved SAE's latents.
    """
    assert sae.threshold is not None
    n_rows = sum(map(len, rows))
    running, before = sae.threshold.clone(), mean_l0(sae, rows)
    sae.threshold.copy_(threshold_for_l0(sae, rows, k, n_rows))
    return {
        "threshold": sae.threshold.item() * norm_factor,
        "training_threshold": running.item() * norm_factor,
        "clean_l0": mean_l0(sae, rows),
        "clean_l0_at_training_threshold": before,
        "rows": "train, clean",
        "n_rows": n_rows,
    }


@torch.no_grad()
def mean_l0(sae: SparseAutoencoder, rows: list[Tensor]) -> float:
    """Active latents a row, in use."""
    n_active = sum(int(sae.spread.latents.total((sae.encode(x) > 0).sum())) for x in rows)
    return n_active / sum(map(len, rows))


def has_running_threshold(sae: SparseAutoencoder) -> bool:
    """Whether its threshold is an average kept while it trained, as BatchTopK's is."""
    return sae.activation.threshold == RUNNING


def calibration_rows(loader: MixedBatchLoader) -> list[Tensor]:
    """Clean rows [batch, d_model] in training units: the first batches of the sweep's own order, 16,384 rows."""
    n_batches = min(-(-N_ROWS // loader.data.batch_size), loader.n_batches)
    return [loader.read(step, with_masked=False).clean for step in range(n_batches)]
