"""Reading ahead: threads that make the next results while the caller works on this one."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from train.workers import CPU, be_ready

Made = TypeVar("Made")


@contextmanager
def read_ahead(
    make: Callable[[int, int], Made], steps: range, *, n_slots: int, n_threads: int, device: torch.device = CPU
) -> Iterator[Iterator[Made]]:
    """Iterate over make(step, slot) in the order of the steps, up to `n_slots` of them made in advance.

    A slot (0 to n_slots - 1) is one result's until the caller asks for the next one, so a slot may own a buffer. What
    `make` raises is raised where its result is due. At the end no thread is left, however many results were taken.
    Each thread, which may use the device, is one for torch too, whose own threads are for the training.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, "read-ahead", initializer=be_ready, initargs=(1, device))
    left = iter(steps)
    waiting: deque[Future[Made]] = deque()

    def begin_next() -> None:
        if (step := next(left, None)) is not None:
            waiting.append(pool.submit(make, step, (step - steps.start) % n_slots))

    def in_order() -> Iterator[Made]:
        while waiting:
            yield waiting.popleft().result()
            begin_next()  # in the slot of the result that the caller is done with

    try:
        for _ in range(n_slots):
            begin_next()
        yield in_order()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what one thread sets is also for those that start later
