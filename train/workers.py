"""Threads that step the runs of a sweep."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Runs a function on many things at once, each with the number of torch threads that it is given."""

    def __init__(self, one: ThreadPoolExecutor, all_: ThreadPoolExecutor) -> None:
        self._one, self._all = one, all_

    def run(
        self,
        function: Callable[[Item], None],
        items: Sequence[tuple[Item, int]],
        meanwhile: Callable[[], Result],
    ) -> Result:
        """`items` are (thing, threads): those with one thread side by side, the others one after another.

        Gives what `meanwhile` does, which runs here in the meantime.
        """
        many = [self._all.submit(function, item) for item, n_threads in items if n_threads > 1]
        single = [] if many else self._submit_single(function, items)
        result = meanwhile()
        for future in many:
            future.result()
        for future in single or self._submit_single(function, items):
            future.result()
        return result

    def _submit_single(self, function: Callable[[Item], None], items: Sequence[tuple[Item, int]]) -> list[Future[None]]:
        return [self._one.submit(function, item) for item, n_threads in items if n_threads == 1]

    def stop(self) -> None:
        """Return when what runs has ended; a step that is half done is no state to keep."""
        self._one.shutdown(cancel_futures=True)
        self._all.shutdown(cancel_futures=True)


@contextmanager
def workers(n_threads: int) -> Iterator[Workers]:
    """Workers on `n_threads` of a CPU.

    The calling thread keeps one: torch's threads wait by spinning, and more of them than cores cost far more than
    they bring (measured: ten times the time of a step).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as one,
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(n_threads,)) as all_,
        ):
            yield Workers(one, all_)
    finally:
        torch.set_num_threads(before)
