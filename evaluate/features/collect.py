"""One pass over the rows of a cache for all latents at once: how often each fires, where most, and samples."""

from dataclasses import dataclass

import numpy as np
import torch

from cache_spec.errors import CacheError
from cache_spec.moments import ordinary_rows
from cache_spec.progress import Progress
from cache_spec.seeds import derive_seed
from evaluate.features.reading import Reading, batches
from evaluate.features.running import N_BINS, Best, count_bins

N_SAMPLE = 60  # firings of each latent, drawn evenly, that the quantile examples are chosen from


@dataclass(frozen=True, kw_only=True, eq=False)
class Firings:
    """What the rows show of every latent; arrays are [d_sae] unless said.

    n_rows: the rows read, of them n_held_out held out of training. counts, masked_counts: rows the latent fires on,
    clean and masked (None without a masked variant). sums: of its values. bins: [d_sae, N_BINS] its values, counted.
    kept: [2, 2, d_sae] over the rows where it fires clean, by whether the row's own token was replaced (0 no, 1 yes):
    the sum of its clean values and of its values in masked text. top: in each window its largest value, the best
    windows. sample: its firings, drawn evenly.
    """

    n_rows: int
    n_held_out: int
    counts: np.ndarray
    masked_counts: np.ndarray | None
    sums: np.ndarray
    bins: np.ndarray
    kept: np.ndarray
    top: Best
    sample: Best

    @property
    def density(self) -> np.ndarray:
        """[d_sae] share of the rows that each latent fires on."""
        return self.counts / self.n_rows


class _Totals:
    def __init__(self, d_sae: int, n_top: int) -> None:
        self.n_rows = self.n_held_out = 0
        self.counts, self.masked_counts = np.zeros(d_sae, dtype=np.int64), np.zeros(d_sae, dtype=np.int64)
        self.sums, self.kept = np.zeros(d_sae), np.zeros((2, 2, d_sae))
        self.bins = np.zeros((d_sae, N_BINS), dtype=np.int64)
        self.top, self.sample = Best(d_sae, n_top), Best(d_sae, N_SAMPLE)


def collect(reading: Reading, *, n_top: int, seed: int) -> Firings:
    """Read all rows of the reading once. What is kept grows with d_sae alone. `seed` draws the samples.

    A window counts once among the top examples, with its largest value; one that the end of a shard cuts counts twice.
    """
    totals = _Totals(reading.sae.d_sae, n_top)
    with Progress("features", min(_n_ordinary(reading), reading.most_rows), "rows") as progress:
        for shard in reading.shards:
            generator = np.random.default_rng(derive_seed("evaluate/firings", seed, shard))
            for inside, window in batches(reading, shard):
                left = reading.most_rows - totals.n_rows
                if left <= 0:
                    break
                _take(reading, shard, inside[:left], window[:left], totals, generator)
                progress.advance(min(len(inside), left))
    if not totals.n_rows:
        raise CacheError(f"{reading.cache.place} holds no ordinary rows (all are special tokens); harvest other text")
    return Firings(
        n_rows=totals.n_rows,
        n_held_out=totals.n_held_out,
        counts=totals.counts,
        masked_counts=totals.masked_counts if reading.masked else None,
        sums=totals.sums,
        bins=totals.bins,
        kept=totals.kept,
        top=totals.top,
        sample=totals.sample,
    )


def _n_ordinary(reading: Reading) -> int:
    """Rows that are no special tokens, in all shards of the reading."""
    flags = (reading.cache.column("flags", shard) for shard in reading.shards)
    return sum(int(ordinary_rows(column).sum()) for column in flags)


def _take(
    reading: Reading,
    shard: int,
    inside: np.ndarray,
    window: np.ndarray,
    totals: _Totals,
    generator: np.random.Generator,
) -> None:
    """Add one batch of rows, given by their places in the shard and their windows, both [n]."""
    cache, d_sae = reading.cache, reading.sae.d_sae
    codes = reading.encode("clean", shard, inside)
    where = torch.nonzero(codes > 0, as_tuple=True)
    values = codes[where].float().cpu().numpy()
    row, latents = (index.cpu().numpy() for index in where)
    rows = shard * cache.plan.shard_rows + inside[row].astype(np.int64)
    totals.n_rows += len(inside)
    totals.n_held_out += len(inside) if cache.plan.split_of(shard) == "held_out" else 0
    totals.counts += np.bincount(latents, minlength=d_sae)
    totals.sums += np.bincount(latents, weights=values, minlength=d_sae)
    totals.bins += count_bins(latents, values, d_sae)
    if reading.masked is not None:
        bit, name = reading.masked
        masked = reading.encode(name, shard, inside)
        totals.masked_counts += (masked > 0).sum(0).cpu().numpy()
        beside = masked[where].float().cpu().numpy()
        replaced = (cache.column("mask", shard)[inside[row]] >> bit) & 1
        for own in (0, 1):
            which = replaced == own
            for i, summed in enumerate((values, beside)):
                totals.kept[own, i] += np.bincount(latents[which], weights=summed[which], minlength=d_sae)
    totals.sample.offer(latents, generator.random(len(values), dtype=np.float32), values, rows)
    # The best of each window and latent is the first of them when the largest come first.
    order = np.lexsort((-values, latents, window[row]))
    pair = window[row[order]] * d_sae + latents[order]
    best = order[np.r_[True, pair[1:] != pair[:-1]]] if len(order) else order
    totals.top.offer(latents[best], values[best], values[best], rows[best])
