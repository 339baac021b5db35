"""Which rows come when: a pure function of seed, epoch and step, so a position is two integers.

An epoch puts the train shards in a random order, turns each to a random start, and cuts the resulting list of
rows into as many equal stretches as shards are open; a batch takes the next contiguous segment of each stretch.
Rows lie shuffled in their shards, so this mixes as well as a pool many times the size.

Epochs follow each other without a gap: where an epoch's rows do not fill a last batch, the batch is filled from the
head of the next epoch's list, and that epoch goes on from there. So every row comes exactly once an epoch, and all
batches have one size. Only such a batch is not spread over the open shards.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from cache_spec.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`n` usable rows of one shard, one after the other: the usable ones number `first` to `first + n - 1`."""

    shard: int
    """Its place in the list of train shards."""
    first: int
    n: int


class RowSchedule:
    """The pieces of every step. `counts` are the usable rows of each shard; together at least one batch."""

    def __init__(self, counts: np.ndarray, *, batch_size: int, n_open: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.n_rows = int(counts.sum())
        assert self.n_rows >= batch_size > 0
        self._counts = counts
        n_open = min(n_open, batch_size)
        self._segments = np.diff(np.arange(n_open + 1) * batch_size // n_open)  # rows from each open shard
        self._before = np.concatenate([[0], np.cumsum(self._segments)[:-1]])
        self._latest: _Epoch | None = None

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, number of the batch among those that start in it) of a step."""
        epoch = step * self.batch_size // self.n_rows
        return epoch, step - -(-epoch * self.n_rows // self.batch_size)

    def pieces(self, step: int) -> list[Piece]:
        """The rows of a step, in the order of the batch."""
        epoch, batch = self.position(step)
        head = -epoch * self.n_rows % self.batch_size  # rows that the batch before took
        n_whole = (self.n_rows - head) // self.batch_size
        if batch < n_whole:
            starts = head + self._before * n_whole + batch * self._segments
            return [
                piece
                for start, n in zip(starts.tolist(), self._segments.tolist(), strict=True)
                for piece in self._stretch(epoch, start, n)
            ]
        done = head + n_whole * self.batch_size
        left = self.n_rows - done
        return [*self._stretch(epoch, done, left), *self._stretch(epoch + 1, 0, self.batch_size - left)]

    def _stretch(self, number: int, start: int, n: int) -> list[Piece]:
        """n rows from place `start` of an epoch's list of rows. A shard that is turned gives two pieces."""
        epoch = self._epoch(number)
        place = bisect_right(epoch.ends, start)
        pieces = []
        while n:
            shard, count = epoch.shards[place], epoch.counts[place]
            offset = start - epoch.ends[place] + count
            first = (epoch.turns[place] + offset) % count if count else 0
            n_here = min(n, count - offset, count - first)
            if n_here:
                pieces.append(Piece(shard=shard, first=first, n=n_here))
            start, n = start + n_here, n - n_here
            place += start == epoch.ends[place]
        return pieces

    def _epoch(self, number: int) -> "_Epoch":
        epoch = self._latest  # one reference: other threads may replace it
        if epoch is None or epoch.number != number:
            generator = np.random.Generator(np.random.Philox(derive_seed("train/rows", self.seed, number)))
            order = generator.permutation(len(self._counts))
            turns = generator.integers(0, np.maximum(self._counts, 1))[order]
            counts = self._counts[order]
            lists = (array.tolist() for array in (order, counts, turns, np.cumsum(counts)))
            epoch = self._latest = _Epoch(number, *lists)
        return epoch


@dataclass(frozen=True)
class _Epoch:
    """The list of an epoch's rows, a shard after the other."""

    number: int
    shards: list[int]
    counts: list[int]
    turns: list[int]
    """The usable row that each shard starts at."""
    ends: list[int]
    """Where each shard ends in the list."""


def epochs_ahead(n_rows: int, n_tokens: int) -> str:
    """What to say before a run that reads rows again; empty if it does not."""
    if n_tokens <= n_rows:
        return ""
    epochs = n_tokens / n_rows
    return (
        f"the cache has {n_rows:,} rows to train on; {n_tokens:,} tokens are {epochs:.2f} epochs: rows will be seen "
        f"up to {-(-n_tokens // n_rows)} times"
    )


def epoch_ended(schedule: RowSchedule, step: int) -> str:
    """What to say before a step if an epoch ended in the step before; else empty."""
    epoch, batch = schedule.position(step)
    if batch or not epoch:
        return ""
    times = "once" if epoch == 1 else f"{epoch} times"
    return f"step {step:,}: all {schedule.n_rows:,} rows were read {times}; again"
