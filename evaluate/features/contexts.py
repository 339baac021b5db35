"""Contexts of examples: the tokens around a row, clean and masked, and the latent's value at each of them."""

from dataclasses import dataclass

import numpy as np

from cache_spec import ActivationCache, ordinary_rows
from cache_spec.progress import Progress
from evaluate.features.reading import Reading, in_text_order

ABSENT = -1  # a token beyond the window, or in a shard that is not there


@dataclass(frozen=True, kw_only=True, eq=False)
class Contexts:
    """Examples in the order they were asked for: latents, rows (of the cache), docs, windows, positions: [n].

    tokens, masked_tokens: [n, width] ids, ABSENT where there is none; column `before` is the example's own token.
    values, masked_values: [n, width] the latent there, 0 at special tokens. masked_* are None without a variant.
    """

    before: int
    latents: np.ndarray
    rows: np.ndarray
    docs: np.ndarray
    windows: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    masked_tokens: np.ndarray | None
    masked_values: np.ndarray | None


def read_contexts(reading: Reading, latents: np.ndarray, rows: np.ndarray, *, before: int, after: int) -> Contexts:
    """Read the windows around examples [n] given by latent and row: only rows that some context shows are encoded."""
    cache = reading.cache
    docs, windows, positions = _provenance(cache, rows)
    shape = (len(rows), before + 1 + after)
    tokens, values = np.full(shape, ABSENT, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    masked_tokens = masked_values = None
    variants = [("clean", "token", tokens, values)]
    if reading.masked is not None:
        _, name = reading.masked
        masked_tokens, masked_values = tokens.copy(), values.copy()
        variants.append((name, f"token_{name}", masked_tokens, masked_values))
    width = cache.plan.window_tokens
    at = positions[:, None] + np.arange(-before, after + 1)
    wanted = np.where((at >= 0) & (at < width), windows[:, None] * width + at, -1)
    with Progress("contexts", len(reading.shards), "shards") as progress:
        for shard in reading.shards:
            order, place = in_text_order(cache, shard)
            here = np.flatnonzero(np.isin(windows, place // width))
            found = np.minimum(np.searchsorted(place, wanted[here]), len(place) - 1)
            example, column = np.nonzero(place[found] == wanted[here])
            inside = order[found[example, column]]  # of the shard, for each token shown
            example = here[example]
            for variant, name, ids, numbers in variants:
                ids[example, column] = cache.column(name, shard)[inside]
                numbers[example, column] = _values(reading, variant, shard, inside, latents[example])
            progress.advance()
    return Contexts(
        before=before,
        latents=latents,
        rows=rows,
        docs=docs,
        windows=windows,
        positions=positions,
        tokens=tokens,
        values=values,
        masked_tokens=masked_tokens,
        masked_values=masked_values,
    )


def _values(reading: Reading, variant: str, shard: int, inside: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """The value of one latent at one row of the shard, for each of [n] such pairs; 0 at special tokens."""
    out = np.zeros(len(inside), dtype=np.float32)
    ordinary = ordinary_rows(reading.cache.column("flags", shard))
    pairs = np.flatnonzero(ordinary[inside])
    pairs = pairs[np.argsort(inside[pairs], kind="stable")]
    distinct, number = np.unique(inside[pairs], return_inverse=True)
    for start in range(0, len(distinct), reading.batch_rows):
        some = distinct[start : start + reading.batch_rows]
        codes = reading.encode(variant, shard, some)
        first, last = np.searchsorted(number, (start, start + len(some)))
        chosen = pairs[first:last]
        out[chosen] = codes[number[first:last] - start, latents[chosen]].float().cpu().numpy()
    return out


def _provenance(cache: ActivationCache, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, window and position of rows [n]: [n] each."""
    shards, inside = np.divmod(rows, cache.plan.shard_rows)
    out = np.zeros((3, len(rows)), dtype=np.int64)
    for shard in np.unique(shards).tolist():
        here = shards == shard
        for line, name in zip(out, ("doc", "window", "pos"), strict=True):
            line[here] = cache.column(name, shard)[inside[here]]
    return out[0], out[1], out[2]
