"""Which runs of the model make a shard; and the reuse of a window's beginning, which every variant shares.

A causal model gives a token the same activation whatever follows it. So a variant need be run only from its first
replaced token on, with the keys and values that the clean run has left: often most of a window when few tokens are
replaced, nearly nothing when many are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# The rule: a shard reuses beginnings if that leaves out at least this share of its tokens. On a CPU 6 % of the tokens
# saved 10 to 15 % of the time and 24 % saved 31 to 34 % (`python -m benchmarks.harvest`); less is not worth it.
WORTH = 0.05
NEVER = 1.0  # the clean variant is always run
_STARTS = 32  # different places to start from in a window: few shapes for the kernels, little lost


@dataclass(frozen=True, kw_only=True)
class Call:
    """One run of the model: some windows of a shard in some variants, variant by variant, from `start` on.

    From a start of 0 it reads whole windows. Otherwise it goes on from the batch's first call: these windows are its
    windows `kept`, and have the same tokens before `start`.
    """

    variants: tuple[int, ...]
    windows: np.ndarray  # [n], counted from the shard's first
    start: int = 0
    kept: np.ndarray | None = None  # [n], counted from the first call's first


Batch = tuple[Call, ...]  # done one after another; what the first keeps serves the others


def choose_batches(first: np.ndarray, window_tokens: int, batch_windows: int, worth: float) -> list[Batch]:
    """The batches of a shard: by reuse if that leaves out the share `worth` of its tokens, else every variant whole.

    `first` [n_variants, n_windows] is the first replaced position. The choice depends on nothing else, so that every
    process makes it alike.
    """
    batches = list(reusing_batches(first, window_tokens, batch_windows))
    if saved_share(batches, first, window_tokens) >= worth:
        return batches
    return list(whole_batches(first, batch_windows))


def whole_batches(first: np.ndarray, batch_windows: int) -> Iterator[Batch]:
    """All variants of a window in one call, so that what differs between them is the masking alone."""
    n_variants, n_windows = first.shape
    for start in range(0, n_windows, batch_windows):
        windows = np.arange(start, min(start + batch_windows, n_windows))
        yield (Call(variants=tuple(range(n_variants)), windows=windows),)


def reusing_batches(first: np.ndarray, window_tokens: int, batch_windows: int) -> Iterator[Batch]:
    """Clean windows whole, then each variant from the first position at which any window of the batch differs.

    The windows are sorted by that position, so that those of a batch share a long beginning. A window in which
    nothing is replaced is not run again.
    """
    step = max(1, window_tokens // _STARTS)
    n_variants, n_windows = first.shape
    order = np.argsort(first[1:].min(axis=0, initial=window_tokens), kind="stable")
    for begin in range(0, n_windows, batch_windows):
        windows = order[begin : begin + batch_windows]
        calls = [Call(variants=(0,), windows=windows)]
        for variant in range(1, n_variants):
            kept = np.flatnonzero(first[variant, windows] < window_tokens)
            if kept.size:
                start = int(first[variant, windows[kept]].min()) // step * step
                calls.append(Call(variants=(variant,), windows=windows[kept], start=start, kept=kept))
        yield tuple(calls)


def saved_share(batches: Sequence[Batch], first: np.ndarray, window_tokens: int) -> float:
    """The share of the tokens, of all windows in all variants, that the batches leave out."""
    n_run = sum(
        len(call.variants) * len(call.windows) * (window_tokens - call.start) for batch in batches for call in batch
    )
    return 1 - n_run / (first.size * window_tokens)
