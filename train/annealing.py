"""The power p of penalty lp: when it falls, and how the penalty's coefficient follows (Karvonen et al. 2024)."""

import torch
from torch import Tensor

from train.parallel.axis import ALONE, Spread
from train.penalties.lp import mean_power


class Annealing:
    """p falls from 1 to `p_end` in `n_updates` moves, spread evenly from `start` to `n_steps`.

    The first move leaves it at 1 and the last one would come after the last step, as dictionary_learning has it. At
    every other move the coefficient is multiplied by mean(penalty at p) / mean(penalty at the next p) over the last
    `n_queue` steps, so the penalty keeps its size. Where there are fewer steps than moves, there are fewer moves.
    """

    def __init__(
        self, *, start: int, n_steps: int, p_end: float, n_updates: int, n_queue: int, dtype: torch.dtype, device: str
    ) -> None:
        n_updates = min(n_updates, n_steps - start + 1)
        self._moves = [start + i * (n_steps - start) // (n_updates - 1) for i in range(n_updates)]
        self._powers = [1 + i * (p_end - 1) / (n_updates - 1) for i in range(n_updates)]
        self.rescale = torch.ones((), dtype=dtype, device=device)
        self._queue = torch.zeros(n_queue, 2, dtype=dtype, device=device)  # penalties at p and at the next p

    def p(self, step: int) -> float:
        """The power at a step counted from 0; a move counts from the step after it."""
        return self._powers[max(self._n_moved(step), 1) - 1]

    @torch.no_grad()
    def observe(self, codes: Tensor, step: int, spread: Spread = ALONE) -> None:
        """After the loss of a step: note its penalties if a move will ask for them, and move if it is time.

        `codes` [batch, d_sae] are those that the penalty saw.
        """
        n_moved, n_queue = self._n_moved(step), len(self._queue)
        if not 0 < n_moved < len(self._moves):
            return
        if not any(0 <= move - step < n_queue for move in self._moves):
            return
        now, following = (mean_power(codes, self._powers[i]) for i in (n_moved - 1, n_moved))
        both = torch.stack([now, following])
        self._queue[step % n_queue] = spread.rows.mean(spread.latents.total(both))
        if step == self._moves[n_moved]:
            now, following = self._queue.sum(0)  # a row that was never written adds nothing to either
            self.rescale = self.rescale * torch.where(following > 0, now / following, 1.0)

    def _n_moved(self, step: int) -> int:
        return sum(move < step for move in self._moves)

    def state(self) -> dict[str, Tensor]:
        return {"lp.rescale": self.rescale, "lp.queue": self._queue}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.rescale, self._queue = (
            tensors[name].to(self._queue.device).clone() for name in ("lp.rescale", "lp.queue")
        )
