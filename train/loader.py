"""Batches from a cache: which rows come when is a pure function of the seed, so a position is two integers.

An epoch puts the train shards in a random order, turns each to a random start, and cuts the resulting list of
rows into as many equal stretches as shards are open; a batch takes the next contiguous segment of each stretch.
Rows lie shuffled in their shards, so this mixes as well as a pool many times the size.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_spec.cache import ActivationCache
from cache_spec.errors import UserError
from cache_spec.layout import FLAG_BOS, FLAG_PAD, FLAG_SPECIAL
from cache_spec.seeds import derive_seed
from train.config import POSITIONS, TARGETS, DataConfig
from train.scale import measure

SKIPPED = FLAG_BOS | FLAG_SPECIAL | FLAG_PAD  # a first token's huge norm would rule the scale and b_dec
MAX_OPEN_SHARDS = 64
SAMPLE_ROWS = 65536  # enough for a mean of squared norms to three digits
_N_KEPT = 4 * MAX_OPEN_SHARDS  # shards are opened once for each stretch; both variants of each


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to train on. `masked` and `row` say where each came from."""

    x: Tensor
    """[batch, d_model] float32, normalised."""
    target: Tensor
    """[batch, d_model], what to reconstruct: `x` itself or the clean rows."""
    masked: Tensor
    """[batch] bool: taken from the masked variant."""
    row: np.ndarray
    """[batch] global row of the cache."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One read: the clean rows of a step and, if any run wants them, their masked twins. All runs mix from it."""

    clean: Tensor
    masked: Tensor | None
    row: np.ndarray
    step: int
    order: Tensor
    """[batch] a random order; the first n rows of it are the masked ones, so a larger share holds a smaller one."""

    def mix(self, masked_fraction: float, target: str = "self") -> Batch:
        """A batch with the exact share of masked rows; over all steps it differs by less than one row."""
        n_masked = n_masked_rows(masked_fraction, len(self.row), self.step)
        chosen = torch.zeros(len(self.row), dtype=torch.bool, device=self.clean.device)
        chosen[self.order[:n_masked]] = True
        if n_masked == 0:
            x = self.clean
        else:
            assert self.masked is not None
            x = self.masked if n_masked == len(self.row) else torch.where(chosen[:, None], self.masked, self.clean)
        return Batch(x=x, target=x if target == "self" else self.clean, masked=chosen, row=self.row)


def n_masked_rows(masked_fraction: float, batch_size: int, step: int) -> int:
    """Masked rows of one step: the whole number that keeps their total nearest to the fraction of all rows."""
    per_batch = Fraction(repr(masked_fraction)) * batch_size

    def total(n_steps: int) -> int:
        return math.floor(per_batch * n_steps + Fraction(1, 2))

    return total(step + 1) - total(step)


class MixedBatchLoader:
    """Reads batches from the train shards of a cache.

    Rows of special tokens are left out. Raises UserError if an option is unknown or the cache has fewer usable
    rows than one batch.
    """

    def __init__(
        self, cache: ActivationCache, data: DataConfig, *, with_masked: bool = True, device: str = "cpu"
    ) -> None:
        _check_options(data)
        self.cache, self.data, self.device = cache, data, torch.device(device)
        self.hook = cache.hook(data.hook)
        if data.masked_variant == "clean":
            raise UserError("--masked-variant clean is the unmasked one; name another, or ask for no masked rows")
        if with_masked or data.positions != "all" or data.masked_variant != DataConfig.masked_variant:
            cache.variant(data.masked_variant)  # refuses one that the cache lacks
        self.with_masked = with_masked
        self.shards = cache.train_shards
        self._indices: dict[int, np.ndarray] = {}
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        counts = [len(self._usable(shard)) for shard in self.shards]
        self.n_rows = sum(counts)
        if self.n_rows < data.batch_size:
            raise UserError(
                f"{cache.path} has {self.n_rows:,} rows to train on, fewer than one batch of {data.batch_size:,}; "
                "lower --batch-size or harvest more tokens"
            )
        self.n_batches = self.n_rows // data.batch_size  # in an epoch
        self.n_steps = data.n_tokens // data.batch_size
        self._counts = np.array(counts)
        n_open = min(self._n_open(), data.batch_size)
        self._segments = np.diff(np.arange(n_open + 1) * data.batch_size // n_open)  # rows from each open shard
        self._stretches = np.concatenate([[0], np.cumsum(self._segments)[:-1]]) * self.n_batches  # where each starts
        self._epoch = (-1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        self.scale = measure(*self._sample())

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batch in the epoch) of a step: all there is to a loader's state."""
        return divmod(step, self.n_batches)

    def read(self, step: int, *, with_masked: bool = True) -> Rows:
        """The rows of one step, on the device, as float32, divided by the norm factor."""
        epoch, batch = self.position(step)
        shards, starts = self._order_of(epoch)
        pieces = [
            piece
            for start, n in zip(self._stretches + batch * self._segments, self._segments, strict=True)
            for piece in self._pieces(shards, starts, int(start), int(n))
        ]
        row = np.concatenate([shard * self.cache.plan.shard_rows + inside for shard, inside in pieces])
        generator = torch.Generator().manual_seed(derive_seed("train/mix", self.data.seed, step))
        return Rows(
            clean=self._gather("clean", pieces, self.scale.norm_factor),
            masked=self._gather(self.data.masked_variant, pieces, self.scale.norm_factor) if with_masked else None,
            row=row,
            step=step,
            order=torch.randperm(len(row), generator=generator).to(self.device),
        )

    def _sample(self) -> tuple[Tensor, Tensor | None]:
        """About 65,536 clean rows as they are in the model, and their masked twins; the same whatever the seed."""
        share = -(-SAMPLE_ROWS // len(self.shards))
        pieces = [(shard, self._usable(shard)[:share]) for shard in self.shards]
        return self._gather("clean", pieces), (
            self._gather(self.data.masked_variant, pieces) if self.with_masked else None
        )

    def _n_open(self) -> int:
        """Open shards: as asked, or enough to hold the windows of two batches' worth of rows."""
        plan = self.cache.plan
        if self.data.open_shards:
            return self.data.open_shards
        wanted = math.ceil(2 * self.data.batch_size * plan.window_tokens / plan.shard_rows)
        return min(max(wanted, 4), MAX_OPEN_SHARDS)

    def _usable(self, shard: int) -> np.ndarray:
        """Numbers of the rows of a shard to train on, in the order they lie there; the latest are remembered."""
        if shard not in self._indices:
            flags = self.cache.column("flags", shard)
            usable = (flags & SKIPPED) == 0
            if self.data.positions != "all":
                variants = [variant.name for variant in self.cache.plan.variants[1:]]
                bit = 1 << variants.index(self.data.masked_variant)
                replaced = (self.cache.column("mask", shard) & bit) != 0
                usable &= replaced if self.data.positions == "only_masked" else ~replaced
            _make_room(self._indices)
            self._indices[shard] = np.flatnonzero(usable)
        return self._indices[shard]

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's shards (as places in `self.shards`) in order, and the row that each starts at."""
        if self._epoch[0] != epoch:
            key = derive_seed("train/rows", self.data.seed, epoch)
            generator = np.random.Generator(np.random.Philox(key))
            order = generator.permutation(len(self.shards))
            self._epoch = (epoch, order, generator.integers(0, np.maximum(self._counts, 1)))
        return self._epoch[1], self._epoch[2]

    def _pieces(self, order: np.ndarray, starts: np.ndarray, start: int, n: int) -> list[tuple[int, np.ndarray]]:
        """n rows from place `start` of the epoch's list of rows: (shard, numbers of rows in it) each."""
        ends = np.cumsum(self._counts[order])
        pieces = []
        while n:
            place = int(np.searchsorted(ends, start, side="right"))
            which = int(order[place])
            count = int(self._counts[which])
            offset = start - int(ends[place]) + count
            n_here = min(n, count - offset)
            turned = (int(starts[which]) + offset + np.arange(n_here)) % count
            pieces.append((self.shards[which], self._usable(self.shards[which])[turned]))
            start, n = start + n_here, n - n_here
        return pieces

    def _gather(self, variant: str, pieces: list[tuple[int, np.ndarray]], norm_factor: float = 1.0) -> Tensor:
        stored = np.empty((sum(len(inside) for _, inside in pieces), self.hook.d_model), np.float16)
        filled = 0
        for shard, inside in pieces:
            rows = self._map(variant, shard)
            np.take(rows, inside, axis=0, out=stored[filled : filled + len(inside)], mode="clip")
            filled += len(inside)
        scale = self.hook.scale_factor / norm_factor
        return torch.from_numpy(stored).to(self.device).to(torch.float32).mul_(scale)

    def _map(self, variant: str, shard: int) -> np.ndarray:
        key = (variant, shard)
        if key not in self._maps:
            _make_room(self._maps)
            self._maps[key] = self.cache.activations(self.hook.name, variant, shard)
        return self._maps[key]


def _make_room(kept: dict[Any, np.ndarray]) -> None:
    """Forget the oldest entry of a full store."""
    if len(kept) >= _N_KEPT:
        kept.pop(next(iter(kept)))


def _check_options(data: DataConfig) -> None:
    for option, value, known in (("positions", data.positions, POSITIONS), ("target", data.target, TARGETS)):
        if value not in known:
            raise UserError(f"--{option} {value} is unknown; it is one of {', '.join(known)}")
    if data.batch_size < 1 or data.n_tokens < data.batch_size:
        raise UserError(f"--tokens {data.n_tokens:,} is less than one batch of {data.batch_size:,}")
