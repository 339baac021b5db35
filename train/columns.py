"""What the columns of a cache say about its rows: which to train on, and which are the same in both views."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache_spec.cache import ActivationCache
from cache_spec.layout import column_file
from cache_spec.moments import ordinary_rows
from train.recent import Recent


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard."""

    usable: np.ndarray
    """[n] numbers of the rows to train on, rising."""
    unreplaced: np.ndarray
    """[rows] bool: the row's own token is the same in the clean and the masked view."""


class RowColumns:
    """Reads the columns of a shard when they are needed and remembers those of the latest shards."""

    def __init__(self, cache: ActivationCache, masked_variant: str, positions: str, n_kept: int) -> None:
        variants = [variant.name for variant in cache.plan.variants[1:]]
        self._cache, self._positions = cache, positions
        self._bit = 1 << variants.index(masked_variant) if masked_variant in variants else 0
        self._latest: Recent[int, ShardRows] = Recent(n_kept)

    def of(self, shard: int) -> ShardRows:
        """Raises CacheDamaged if a column fails its checksum."""
        return self._latest.get(shard, self._read)

    def counts(self, shards: Sequence[int]) -> np.ndarray:
        """[shards] rows to train on in each."""
        names = ["flags", *(["mask"] if self._bit else [])]
        self._cache.files.gather([column_file(name, shard) for shard in shards for name in names])
        return np.array([len(self.of(shard).usable) for shard in shards])

    def _read(self, shard: int) -> ShardRows:
        usable = ordinary_rows(self._cache.column("flags", shard))  # a first token's huge norm would rule the scale
        unreplaced = np.ones(len(usable), bool)
        if self._bit:
            unreplaced = (self._cache.column("mask", shard) & self._bit) == 0
        if self._positions != "all":
            usable &= ~unreplaced if self._positions == "only_masked" else unreplaced
        return ShardRows(np.flatnonzero(usable).astype(np.uint32), unreplaced)
