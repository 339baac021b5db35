"""Threads that step the runs of a sweep."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
CPU = torch.device("cpu")


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


def be_ready(n_threads: int, device: torch.device) -> None:
    """For a thread that computes: torch's own threads, and the GPU on which it launches what names none, as a kernel
    does; a new thread would take the first."""
    torch.set_num_threads(n_threads)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


@contextmanager
def workers(n_threads: int, device: torch.device = CPU) -> Iterator[Workers]:
    """Workers on `n_threads` of a CPU, for SAEs on a device.

    The calling thread keeps one: torch's threads wait by spinning, and more of them than cores cost far more than
    they bring (measured: ten times the time of a step).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            ThreadPoolExecutor(n_threads, initializer=be_ready, initargs=(1, device)) as one,
            ThreadPoolExecutor(1, initializer=be_ready, initargs=(n_threads, device)) as all_,
        ):
            yield Workers(one, all_)
    finally:
        torch.set_num_threads(before)
