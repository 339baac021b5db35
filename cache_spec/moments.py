"""Mean and spread of the activations of a shard, so that training can normalise without a pass over the cache.

Only ordinary rows count: those whose token is no BOS, no other special token and no padding, which is what training
uses. Parts are merged by the formula of Chan, Golub and LeVeque (1979), which loses nothing to a large mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cache_spec.layout import FLAG_BOS, FLAG_PAD, FLAG_SPECIAL, FLAG_VALID

_FLAGS = FLAG_VALID | FLAG_BOS | FLAG_SPECIAL | FLAG_PAD
_SIGN_AND_SIZE = np.int32(-0x70000001)  # all bits of a float32 but the three below its sign


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Of `n` rows: the mean [d_model] and m2 [d_model], the sum of squared deviations from it; NaN without rows."""

    n: int
    mean: np.ndarray
    m2: np.ndarray

    @property
    def mean_square_norm(self) -> float:
        """The mean of the squared length of a row."""
        return float(self.mean @ self.mean + self.m2.sum() / self.n) if self.n else float("nan")


def ordinary_rows(flags: np.ndarray) -> np.ndarray:
    """[rows] of the column `flags` -> which rows count, bool: for the moments, for training and for evaluation."""
    return (flags & _FLAGS) == FLAG_VALID


def moments_of(rows: np.ndarray, ordinary: np.ndarray, at_once: int = 1024) -> Moments:
    """Moments of the ordinary ones ([n] bool) of fp16 rows [n, d_model], in their own units."""
    blocks = (slice(start, start + at_once) for start in range(0, len(rows), at_once))
    return merge((moments_of_block(rows[block], ordinary[block]) for block in blocks), rows.shape[1])


def moments_of_block(rows: np.ndarray, ordinary: np.ndarray) -> Moments:
    """The same of a few thousand rows, at once. A rough mean first; what it misses is put right afterwards."""
    values = widen(rows[ordinary])
    n = len(values)
    if not n:
        return Moments(n=0, mean=np.empty(0), m2=np.empty(0))
    # Sums run down the rows one after the other, so they are the same on every machine and with any threads.
    rough = np.add.reduce(values, axis=0) / np.float32(n)
    values -= rough
    missed = np.add.reduce(values, axis=0).astype(np.float64) / n
    np.square(values, out=values)
    m2 = np.add.reduce(values, axis=0).astype(np.float64) - n * missed * missed
    return Moments(n=n, mean=rough.astype(np.float64) + missed, m2=np.maximum(m2, 0.0))


def merge(parts: Iterable[Moments], d_model: int) -> Moments:
    """Moments of all rows that the parts were taken of."""
    n, mean, m2 = 0, np.zeros(d_model), np.zeros(d_model)
    for part in parts:
        if part.n:
            away, total = part.mean - mean, n + part.n
            mean = mean + away * (part.n / total)
            m2 = m2 + part.m2 + away * away * (n * part.n / total)
            n = total
    return Moments(n=n, mean=mean, m2=m2) if n else Moments(n=0, mean=mean * np.nan, m2=m2 * np.nan)


def widen(rows: np.ndarray) -> np.ndarray:
    """fp16 -> float32, exactly. Moving the bits is several times faster than `astype`, and does not hold the GIL."""
    bits = np.ascontiguousarray(rows).view("<i2").astype("<i4")
    bits <<= 13
    bits &= _SIGN_AND_SIZE
    values = bits.view("<f4")
    values *= np.float32(2.0**112)  # the exponents of the two types count from different numbers
    return values
