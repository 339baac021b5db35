"""Running statistics of many latents over a stream of firings: the best few of each, and a histogram of its values."""

import numpy as np

BINS_PER_OCTAVE = 8
LOWEST, HIGHEST = -12 * BINS_PER_OCTAVE, 20 * BINS_PER_OCTAVE  # 2**-12 to 2**20; the outer bins take what is beyond
N_BINS = HIGHEST - LOWEST


class Best:
    """The `n` entries with the largest keys of each latent, largest first; of equal keys the one that came first.

    keys, values: [d_sae, n]; rows: [d_sae, n] int64, -1 where there is none. With the values as keys these are the
    top examples; with random keys, an even sample.
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self.n = n
        self.keys = np.full((d_sae, n), -np.inf, dtype=np.float32)
        self.values = np.zeros((d_sae, n), dtype=np.float32)
        self.rows = np.full((d_sae, n), -1, dtype=np.int64)

    def offer(self, latents: np.ndarray, keys: np.ndarray, values: np.ndarray, rows: np.ndarray) -> None:
        """Take in entries [n_entries] of any latents."""
        able = np.flatnonzero(keys > self.keys[latents, -1])
        able = able[np.lexsort((-keys[able], latents[able]))]  # by latent, then the largest first
        touched, starts, counts = np.unique(latents[able], return_index=True, return_counts=True)
        rank = np.arange(len(able)) - np.repeat(starts, counts)
        group = np.repeat(np.arange(len(touched)), counts)
        few = rank < self.n
        able, rank, group = able[few], rank[few], group[few]
        old = (self.keys[touched], self.values[touched], self.rows[touched])
        new = [np.full_like(part, empty) for part, empty in zip(old, (-np.inf, 0, -1), strict=True)]
        for part, entries in zip(new, (keys, values, rows), strict=True):
            part[group, rank] = entries[able]
        both = [np.concatenate(pair, axis=1) for pair in zip(old, new, strict=True)]  # each [n_touched, 2 n]
        order = np.argsort(-both[0], axis=1, kind="stable")[:, : self.n]
        for mine, part in zip((self.keys, self.values, self.rows), both, strict=True):
            mine[touched] = np.take_along_axis(part, order, axis=1)


def bins_of(values: np.ndarray) -> np.ndarray:
    """The bin of each positive value, 0 to N_BINS - 1."""
    return np.clip(np.floor(np.log2(values) * BINS_PER_OCTAVE).astype(np.int64), LOWEST, HIGHEST - 1) - LOWEST


def bin_edges() -> np.ndarray:
    """[N_BINS + 1] where the bins begin and end."""
    return 2.0 ** (np.arange(LOWEST, HIGHEST + 1) / BINS_PER_OCTAVE)


def count_bins(latents: np.ndarray, values: np.ndarray, d_sae: int) -> np.ndarray:
    """[d_sae, N_BINS] how many values of each latent fall into each bin."""
    return np.bincount(latents * N_BINS + bins_of(values), minlength=d_sae * N_BINS).reshape(d_sae, N_BINS)
