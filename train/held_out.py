"""A first look at a finished SAE: L0 and explained variance on clean rows it was never trained on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.loader import SKIPPED, MixedBatchLoader
from train.step import TrainRun

MAX_ROWS = 16384


def held_out_rows(loader: MixedBatchLoader) -> Tensor | None:
    """Up to 16,384 clean held-out rows [n, d_model] in training units; None if the cache has none."""
    chosen: list[np.ndarray] = []
    n_left = MAX_ROWS
    for shard in loader.cache.held_out_shards:
        if n_left <= 0:
            break
        usable = np.flatnonzero((loader.cache.column("flags", shard) & SKIPPED) == 0)[:n_left]
        chosen.append(loader.cache.activations(loader.hook.name, "clean", shard)[usable])
        n_left -= len(usable)
    if n_left == MAX_ROWS:
        return None
    rows = torch.from_numpy(np.concatenate(chosen)).to(loader.device).to(torch.float32)
    return rows * (loader.hook.scale_factor / loader.scale.norm_factor)


@torch.no_grad()
def measure_held_out(run: TrainRun, rows: Tensor | None) -> dict[str, Any]:
    """l0 and explained_variance = 1 - squared error over squared distance from the mean; None without rows.

    n_dead counts the latents that training left silent for `dead_tokens`.
    """
    facts: dict[str, Any] = {"l0": None, "explained_variance": None, "n_dead": int(run.dead().sum())}
    if rows is None:
        return {"held_out": facts}
    n_active, error = 0, 0.0
    for part in rows.split(2048):
        f = run.sae.encode(part)
        n_active += int((f > 0).sum())
        error += (part - run.sae.decode(f)).square().sum().item()
    variance = (rows - rows.mean(0)).square().sum().item()
    facts["l0"] = n_active / len(rows)
    facts["explained_variance"] = 1 - error / variance if variance > 0 else None
    return {"held_out": facts}
