"""What training gets from a loader: rows one step after another, and a count of the time that it waited for them."""

import time
from collections.abc import Iterator

from torch import Tensor

from train.mixing import Rows
from train.staging import Stage

_AT_ONCE = 1e-3  # seconds: less is no waiting


class Stream:
    """An iterator over rows that are made ahead.

    `waited` are the seconds that its caller waited for rows, `n_late` the steps whose rows were not there when they
    were asked for; the first, which nobody could have made ahead, is left out. Both are upper bounds for a training
    that computes meanwhile, as on a GPU.
    """

    def __init__(self, made: Iterator[tuple[Stage, Rows]]) -> None:
        self._made, self._is_first = made, True
        self.waited, self.n_late = 0.0, 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Rows:
        began = time.perf_counter()
        stage, rows = next(self._made)
        waited = time.perf_counter() - began
        ready = stage.received([value for value in vars(rows).values() if isinstance(value, Tensor)])
        if not self._is_first:
            self.waited += waited
            self.n_late += waited > _AT_ONCE or not ready
        self._is_first = False
        return rows
