"""Ctrl-C: once finishes the work in progress, twice stops at once. A scheduler's SIGTERM counts the same."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class Stop:
    """Whether someone asked to stop, and what would be finished first."""

    def __init__(self) -> None:
        self.asked = False
        self._work = ""

    def finish(self, work: str) -> None:
        """From now on the first signal lets `work` finish, e.g. "shard 3"; without any it stops at once."""
        self._work = work

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt at the second signal, and at the first if there is nothing to finish."""
        if self.asked or not self._work:
            raise KeyboardInterrupt
        self.asked = True
        # Not by print: the signal may have come in the middle of one, and a stream cannot be entered twice.
        os.write(_STDERR, f"\nfinishing {self._work}; Ctrl-C again stops at once\n".encode())


@contextmanager
def catch_stops() -> Iterator[Stop]:
    """While inside, SIGINT and SIGTERM go to a `Stop`; afterwards to whom they went before.

    Only the main thread may catch signals; in another one nobody asks.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # One that is ignored stays so: a shell starts background jobs of a script like that.
    caught = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.on_signal) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
