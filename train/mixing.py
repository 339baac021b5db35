"""Batches mixed from the clean and the masked rows of one read: exact shares, and the same order for all runs."""

import math
from dataclasses import dataclass
from fractions import Fraction

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


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One read: the clean rows of a step and, if any run wants them, their masked twins. All runs mix from it."""

    clean: Tensor
    masked: Tensor | None
    row: np.ndarray
    step: int
    order: Tensor
    """[batch] a random order; the first n rows of it are the masked ones, so a larger share holds a smaller one."""
    unreplaced: Tensor | None = None
    """[batch] bool: the row's own token was not replaced; read with the masked rows."""
    target_clean: Tensor | None = None
    """[batch, d_out] the same rows at the target's hook point; None if the target is the input's own."""
    target_masked: Tensor | None = None

    def mix(
        self, masked_fraction: float, target: str = "self", *, schedule: str = CONSTANT, with_twin: bool = False
    ) -> Batch:
        """A batch with the exact share of masked rows; over all steps it differs by less than one row.

        Raises UserError for an unknown schedule.
        """
        n_masked = n_masked_rows(masked_fraction, len(self.row), self.step, schedule)
        chosen = torch.zeros(len(self.row), dtype=torch.bool, device=self.clean.device)
        chosen[self.order[:n_masked]] = True
        x = _choose(chosen, n_masked, self.clean, self.masked)
        goal = x
        if self.target_clean is not None:
            n_wanted = n_masked if target == "self" else 0
            goal = _choose(chosen, n_wanted, self.target_clean, self.target_masked)
        elif target != "self":
            goal = self.clean
        twin = _choose(~chosen, len(self.row) - n_masked, self.clean, self.masked) if with_twin else None
        paired = self.unreplaced if with_twin else None
        return Batch(x=x, target=goal, masked=chosen, row=self.row, twin=twin, paired=paired)


def _choose(chosen: Tensor, n_chosen: int, clean: Tensor, masked: Tensor | None) -> Tensor:
    """[batch, d]: the masked row where `chosen`, else the clean one; without a copy if they are all of one kind."""
    if n_chosen == 0:
        return clean
    assert masked is not None  # whoever reads knows the fractions of all runs
    return masked if n_chosen == len(chosen) else torch.where(chosen[:, None], masked, clean)


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
