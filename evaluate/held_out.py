"""Held-out rows of a cache: some to set thresholds on, and others to score."""

from dataclasses import dataclass

import numpy as np
import torch

from cache_spec import ActivationCache, CacheDamaged, CacheError, HookPlan, ordinary_rows
from evaluate.rows import Rows

MAX_ROWS = 65536  # most rows to calibrate on, and most to score


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """The held-out rows of a cache: calibration and scored rows come from different documents."""

    calibration: Rows
    clean: Rows
    masked: Rows | None
    replaced: np.ndarray | None


def read_held_out(cache: ActivationCache, hook: HookPlan, device: str) -> HeldOut:
    """Up to 65,536 rows to calibrate on (documents with odd numbers) and as many to score, specials left out.

    Raises CacheError if the cache holds no rows out of training, or too few to split, and CacheDamaged if some are not
    finite.
    """
    masked = masked_variant(cache)
    pieces: dict[str, list[np.ndarray]] = {"calibration": [], "clean": [], "masked": [], "replaced": []}
    for shard in cache.held_out_shards:
        usable = ordinary_rows(cache.column("flags", shard))
        odd = cache.column("doc", shard) % 2 == 1
        calibrating, scored = np.flatnonzero(usable & odd), np.flatnonzero(usable & ~odd)
        clean = cache.activations(hook.name, "clean", shard)
        pieces["calibration"].append(clean[calibrating])
        pieces["clean"].append(clean[scored])
        if masked is not None:
            bit, name = masked
            pieces["masked"].append(cache.activations(hook.name, name, shard)[scored])
            pieces["replaced"].append((cache.column("mask", shard)[scored] >> bit) & 1 == 1)
        if min(_n_rows(pieces["calibration"]), _n_rows(pieces["clean"])) >= MAX_ROWS:
            break
    if not min(_n_rows(pieces["calibration"]), _n_rows(pieces["clean"])):
        raise CacheError(
            f"{cache.place} holds no two documents kept out of training to score on; harvest it with --held-out 0.05"
        )

    def rows(name: str) -> Rows:
        stacked = np.concatenate(pieces[name])[:MAX_ROWS].astype(np.float32) * np.float32(hook.scale_factor)
        if not np.isfinite(stacked).all():
            raise CacheDamaged(
                f"{cache.place} holds numbers that are not finite in {hook.name}/{name}, out of training; "
                f"python -m cache_spec verify {cache.place} says where"
            )
        return Rows(x=torch.from_numpy(stacked).to(device))

    return HeldOut(
        calibration=rows("calibration"),
        clean=rows("clean"),
        masked=rows("masked") if masked else None,
        replaced=np.concatenate(pieces["replaced"])[:MAX_ROWS] if masked else None,
    )


def _n_rows(pieces: list[np.ndarray]) -> int:
    return sum(map(len, pieces))


def masked_variant(cache: ActivationCache) -> tuple[int, str] | None:
    """(bit in the mask column, name) of the variant whose rows are scored beside the clean ones."""
    others = [variant.name for variant in cache.plan.variants[1:]]
    if not others:
        return None
    name = "masked" if "masked" in others else others[0]
    return others.index(name), name
