"""A first look at a finished SAE: L0 and explained variance on clean rows it was never trained on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_spec.moments import ordinary_rows
from cache_spec.plan import HookPlan
from train.loader import MixedBatchLoader
from train.scale import Scale, refuse_non_finite
from train.step import TrainRun

MAX_ROWS = 16384


def held_out_rows(loader: MixedBatchLoader) -> Tensor | None:
    """Up to 16,384 clean held-out rows [n, d_model] in training units; None if the cache has none.

    Raises UserError if one holds NaN or infinity.
    """
    return _rows(loader, loader.hook, loader.scale)


def held_out_targets(loader: MixedBatchLoader) -> Tensor | None:
    """What a transcoder makes of `held_out_rows` [n, d_out]: the same rows at its target; None for a plain SAE."""
    return _rows(loader, loader.target_hook, loader.target_scale) if loader.data.target_hook else None


def _rows(loader: MixedBatchLoader, hook: HookPlan, scale: Scale) -> Tensor | None:
    chosen: list[Tensor] = []
    n_left = MAX_ROWS
    for shard in loader.cache.held_out_shards:
        if n_left <= 0:
            break
        usable = np.flatnonzero(ordinary_rows(loader.cache.column("flags", shard)))[:n_left]
        stored = torch.from_numpy(loader.cache.activations(hook.name, "clean", shard)[usable])
        chosen.append(stored.to(loader.device).to(torch.float32))
        refuse_non_finite(chosen[-1].sum(1), f"{hook.name} in held-out shard {shard} of {loader.cache.place}")
        n_left -= len(usable)
    if n_left == MAX_ROWS:
        return None
    return torch.cat(chosen) * (hook.scale_factor / scale.norm_factor)


@torch.no_grad()
def measure_held_out(run: TrainRun, rows: Tensor | None, targets: Tensor | None = None) -> dict[str, Any]:
    """l0 and explained_variance = 1 - squared error over squared distance from the mean; None without rows.

    The variance is that of what is reconstructed: the rows, or a transcoder's targets. n_dead counts the latents that
    training left silent for `dead_tokens`.
    """
    latents = run.spread.latents
    n_dead = int(latents.total(run.dead().sum()))
    facts: dict[str, Any] = {"l0": None, "explained_variance": None, "n_dead": n_dead}
    if rows is None:
        return {"held_out": facts}
    targets = rows if targets is None else targets
    n_active, error = 0, 0.0
    for part, target in zip(rows.split(2048), targets.split(2048), strict=True):
        f = run.sae.encode(part)
        n_active += int(latents.total((f > 0).sum()))
        error += (target - run.sae.decode(f, part)).square().sum().item()
    variance = (targets - targets.mean(0)).square().sum().item()
    facts["l0"] = n_active / len(rows)
    facts["explained_variance"] = 1 - error / variance if variance > 0 else None
    return {"held_out": facts}
