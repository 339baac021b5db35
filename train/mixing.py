"""Batches mixed from the clean and the masked rows of one read: exact shares, and the same order for all runs."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_spec.errors import UserError

CONSTANT = "constant"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to train on. `masked` and `row` say where each came from."""

    x: Tensor
    """[batch, d_model] float32, normalised."""
    target: Tensor
    """[batch, d_out], what to reconstruct: `x` itself, the clean rows, or the rows of another hook point."""
    masked: Tensor
    """[batch] bool: taken from the masked variant."""
    row: np.ndarray
    """[batch] global row of the cache."""
    twin: Tensor | None = None
    """[batch, d_model] the other view of each row: masked where `x` is clean and clean where it is masked."""
    paired: Tensor | None = None
    """[batch] bool: the row's own token is the same in both views; comes with `twin`."""


class Mixture(NamedTuple):
    """What a run wants of every step: runs that agree in this share their batches."""

    masked_fraction: float
    schedule: str = CONSTANT
    with_twin: bool = False


CLEAN = frozenset({Mixture(0.0)})
BOTH = frozenset({Mixture(0.5, with_twin=True)})
"""Every row in both views, from which any mixture can be made."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """The rows of a step that some mixture takes, by their place in the order of masking.

    `mix` masks the first n of that order, so rows from `clean_from` on are wanted clean and those before `masked_to`
    masked. Where both are one number each row is wanted once, and one tensor holds them all.
    """

    clean_from: int
    masked_to: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One read: the rows of a step in the views that any run wants. All runs mix from it."""

    clean: Tensor
    """[batch, d_model] rows that nobody wants clean hold anything, or are masked if `masked` is the same tensor."""
    masked: Tensor | None
    row: np.ndarray
    step: int
    rank: Tensor
    """[batch] each row's place in the order of masking: a larger share holds a smaller one."""
    need: Need
    """What may be asked of `mix`."""
    unreplaced: Tensor | None = None
    """[batch] bool: the row's own token was not replaced; comes with both views of each row."""
    target_clean: Tensor | None = None
    """[batch, d_out] the same rows at the target's hook point; None if the target is the input's own."""
    target_masked: Tensor | None = None

    def mix(
        self, masked_fraction: float, target: str = "self", *, schedule: str = CONSTANT, with_twin: bool = False
    ) -> Batch:
        """A batch with the exact share of masked rows; over all steps it differs by less than one row.

        Raises UserError for an unknown schedule.
        """
        n_rows = len(self.row)
        n_masked = n_masked_rows(masked_fraction, n_rows, self.step, schedule)
        assert self.need.clean_from <= n_masked <= self.need.masked_to  # whoever reads knows the mixtures of all runs
        chosen = self.rank < n_masked
        x = _choose(chosen, n_masked, self.clean, self.masked)
        goal = x
        if self.target_clean is not None:
            n_wanted = n_masked if target == "self" else 0
            goal = _choose(chosen, n_wanted, self.target_clean, self.target_masked)
        elif target != "self":
            goal = self.clean
        twin = _choose(~chosen, n_rows - n_masked, self.clean, self.masked) if with_twin else None
        paired = self.unreplaced if with_twin else None
        return Batch(x=x, target=goal, masked=chosen, row=self.row, twin=twin, paired=paired)


def _choose(chosen: Tensor, n_chosen: int, clean: Tensor, masked: Tensor | None) -> Tensor:
    """[batch, d]: the masked row where `chosen`, else the clean one; without a copy where one tensor has them all."""
    if n_chosen == 0:
        return clean
    assert masked is not None
    return masked if masked is clean or n_chosen == len(chosen) else torch.where(chosen[:, None], masked, clean)


def masking_ranks(sizes: Sequence[int], seed: int) -> np.ndarray:
    """[batch] int32: the place of each row in the order of masking, for a batch of segments of these sizes.

    Any first n of the order are the heads of all segments, each in proportion to its size. So they are contiguous in
    the files, and as good as drawn one by one: rows lie shuffled in their shards, and every epoch cuts elsewhere.
    """
    each = np.asarray(sizes)
    place = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)  # in its segment
    offset = np.random.Generator(np.random.Philox(seed)).random(len(each))  # else the same ones would round up always
    rank = np.empty(len(place), np.int32)
    rank[np.argsort((place + np.repeat(offset, each)) / np.repeat(each, each), kind="stable")] = np.arange(len(place))
    return rank


def need_of(mixtures: Set[Mixture], batch_size: int, step: int) -> Need:
    """What the mixtures of a step, at least one, take together; who wants twins takes every row in both views."""
    if any(each.with_twin for each in mixtures):
        return Need(clean_from=0, masked_to=batch_size)
    counts = [n_masked_rows(each.masked_fraction, batch_size, step, each.schedule) for each in mixtures]
    return Need(clean_from=min(counts), masked_to=max(counts))


def n_masked_rows(masked_fraction: float, batch_size: int, step: int, schedule: str = CONSTANT) -> int:
    """Masked rows of one step: the whole number that keeps their total nearest to the fraction of all rows so far.

    With the schedule `linear=N` the fraction of step s is min(s / N, 1) of the final one. Raises UserError for
    another schedule.
    """
    n_rising = rising_steps(schedule)
    per_batch = Fraction(repr(masked_fraction)) * batch_size

    def total(n_steps: int) -> int:
        n_risen = min(n_steps, n_rising)
        full_steps = n_steps - n_risen
        if n_risen:
            full_steps += Fraction(n_risen * (n_risen - 1), 2 * n_rising)  # sum of s / N over the steps before N
        return math.floor(per_batch * full_steps + Fraction(1, 2))

    return total(step + 1) - total(step)


def rising_steps(schedule: str) -> int:
    """N of `linear=N`, 0 of `constant`. Raises UserError for anything else."""
    name, _, number = schedule.partition("=")
    if schedule == CONSTANT:
        return 0
    if name == "linear" and number.isascii() and number.isdigit() and int(number):
        return int(number)
    raise UserError(
        f"--masked-schedule {schedule} is unknown; write constant, or linear=N for a fraction that rises from 0 over "
        "N steps"
    )
