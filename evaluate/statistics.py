"""Statistics of a few seeds: means, paired t-tests, Holm's correction, and how many seeds an effect would need."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
LEVEL = 0.05  # two-sided, of a whole family of comparisons
POWER = 0.8
MOST_SEEDS = 10_000
N_NODES = 256  # of the quadrature that gives the power; more change nothing in the sixth decimal


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds; `error` is its standard error, NaN for a single seed."""

    mean: float
    error: float
    n: int


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Mean of n paired differences, its standard error and 95 % t-interval, and p of the two-sided t-test.

    All but the mean are NaN for a single pair.
    """

    mean: float
    error: float
    low: float
    high: float
    n: int
    p: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the values of several seeds."""
    numbers = np.asarray(values, dtype=float)
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else float("nan")
    return Estimate(mean=float(numbers.mean()), error=error, n=len(numbers))


def paired_test(differences: Sequence[float]) -> PairedTest:
    """The two-sided t-test of differences [n] against 0. Differences that are all the same have p = 0, or 1 at 0."""
    found = estimate(differences)
    if found.n < 2:
        nan = float("nan")
        return PairedTest(mean=found.mean, error=nan, low=nan, high=nan, n=found.n, p=nan)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1)) * found.error
    if found.error > 0:
        p = float(2 * stats.t.sf(abs(found.mean) / found.error, found.n - 1))
    else:
        p = 1.0 if found.mean == 0 else 0.0
    return PairedTest(
        mean=found.mean, error=found.error, low=found.mean - reach, high=found.mean + reach, n=found.n, p=p
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than one before it; at most 1.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = largest
    return adjusted


def power(n: int, effect: float, level: float) -> float:
    """The chance that a two-sided paired t-test of n pairs at `level` sees an effect of so many standard deviations.

    The statistic is noncentral t, (Z + shift) / S with shift = effect * sqrt(n) and S^2 a chi-square of n - 1 degrees
    of freedom over their number; so P(T > c) is the mean over S of P(Z > c S - shift). (SciPy's own noncentral t gives
    NaN here and there.)
    """
    critical, shift = float(special.stdtrit(n - 1, 1 - level / 2)), abs(effect) * np.sqrt(n)
    spread, weights = _spread(n)
    return float(weights @ (special.ndtr(shift - critical * spread) + special.ndtr(-shift - critical * spread)))


@lru_cache(maxsize=256)
def _spread(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of S and their weights, [n_nodes] each: Gauss-Legendre over the quantiles of the chi-square."""
    nodes, weights = _legendre()
    quantiles = special.gammaincinv((n - 1) / 2, (nodes + 1) / 2)
    return np.sqrt(2 * quantiles / (n - 1)), weights / 2


@cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(N_NODES)


def seeds_needed(mean: float, deviation: float, n_family: int) -> int | None:
    """Seeds per arm with which a paired t-test at 0.05 / n_family has 80 % power for this mean and deviation.

    None if that takes more than 10,000, or if the deviation is not known.
    """
    if not np.isfinite(deviation) or not np.isfinite(mean) or mean == 0:
        return None
    if deviation == 0:
        return 2
    effect, level = mean / deviation, LEVEL / max(n_family, 1)
    low, high = 1, MOST_SEEDS  # too few, enough
    if power(high, effect, level) < POWER:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if power(middle, effect, level) < POWER:
            low = middle
        else:
            high = middle
    return high


def smallest_effect(n: int, n_family: int) -> float:
    """The effect, in standard deviations of a paired difference, that n pairs see with 80 % power at 0.05 / n_family.

    NaN for a single pair.
    """
    if n < 2:
        return float("nan")
    level, low, high = LEVEL / max(n_family, 1), 0.0, 1.0
    while power(n, high, level) < POWER:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(n, middle, level) < POWER else (low, middle)
    return high
