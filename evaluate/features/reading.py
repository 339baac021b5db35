"""Rows of a cache window by window: what both passes over a cache read, in the cache's own order of shards."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_spec import ActivationCache, CacheDamaged, CacheError, HookPlan, ordinary_rows
from evaluate.held_out import masked_variant
from train.sae import SparseAutoencoder

_BATCH_VALUES = 2**26  # most codes at once, rows x d_sae: 256 MB
_MOST_BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """An SAE and the rows it is read on: shards in the order of reading, held-out ones first."""

    cache: ActivationCache
    hook: HookPlan
    sae: SparseAutoencoder
    device: str
    shards: tuple[int, ...]
    most_rows: int

    @property
    def masked(self) -> tuple[int, str] | None:
        """(bit in the mask column, name) of the variant that stands beside the clean text; None if there is none."""
        return masked_variant(self.cache)

    @property
    def batch_rows(self) -> int:
        """How many rows to encode at once."""
        return max(1, min(_MOST_BATCH_ROWS, _BATCH_VALUES // self.sae.d_sae))

    @torch.no_grad()
    def encode(self, variant: str, shard: int, inside: np.ndarray) -> Tensor:
        """Codes [n, d_sae] of rows [n] of a shard, by their place in it. Raises CacheDamaged if some are not finite."""
        stored = self.cache.activations(self.hook.name, variant, shard)[inside]
        x = torch.from_numpy(stored.astype(np.float32) * np.float32(self.hook.scale_factor))
        if not bool(torch.isfinite(x).all()):
            raise CacheDamaged(
                f"{self.cache.place} holds numbers that are not finite in {self.hook.name}/{variant}; "
                f"python -m cache_spec verify {self.cache.place} says where"
            )
        return self.sae.encode(x.to(self.device))


def make_reading(
    cache: ActivationCache, hook: HookPlan, sae: SparseAutoencoder, *, device: str, most_rows: int
) -> Reading:
    """Read at most `most_rows` rows: the held-out ones, then those of the training shards. CacheError if none is."""
    shards, n = [], 0
    for shard in (*cache.held_out_shards, *cache.train_shards):
        if n >= most_rows:
            break
        shards.append(shard)
        n += cache.rows_in(shard)
    if not shards:
        raise CacheError(f"{cache.place} holds no rows yet; finish its harvest")
    return Reading(cache=cache, hook=hook, sae=sae, device=device, shards=tuple(shards), most_rows=most_rows)


def in_text_order(cache: ActivationCache, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """(places in the shard in the order of the text [rows], window * window_tokens + position of each, ascending)."""
    place = cache.column("window", shard).astype(np.int64) * cache.plan.window_tokens + cache.column("pos", shard)
    order = np.argsort(place, kind="stable")
    return order, place[order]


def batches(reading: Reading, shard: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole windows, as many as fit a batch: (places in the shard [n], window of each [n]), ordinary rows alone.

    A window longer than a batch is a batch of its own.
    """
    cache = reading.cache
    order, place = in_text_order(cache, shard)
    usable = ordinary_rows(cache.column("flags", shard))[order]
    order, window = order[usable], place[usable] // cache.plan.window_tokens
    starts = np.flatnonzero(np.r_[True, window[1:] != window[:-1]]) if len(window) else np.array([], dtype=np.int64)
    begin = 0
    for start, end in zip(starts, [*starts[1:], len(window)], strict=True):
        if end - begin > reading.batch_rows and start > begin:
            yield order[begin:start], window[begin:start]
            begin = start
    if begin < len(window):
        yield order[begin:], window[begin:]
