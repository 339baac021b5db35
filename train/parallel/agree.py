"""What processes that train one SAE have to do alike: take one's word, and stop at the same step."""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from cache_spec.errors import UserError
from train.parallel.axis import Spread

Told = TypeVar("Told")


class StoppedTogether(KeyboardInterrupt):
    """Every process is at the end of the same step, and all of them stop there."""


def led(spread: Spread, make: Callable[[], Told]) -> Told:
    """What `make` gives on the process that leads, of the types that JSON has: the others wait and are told.

    A UserError there is raised on all of them.
    """
    if spread.size == 1:
        return make()
    if not spread.leads:
        return _heard(spread)
    try:
        made = make()
    except UserError as error:
        _tell(spread, {"error": str(error), "exit_code": error.exit_code})
        raise
    _tell(spread, {"made": made})
    return made


def _tell(spread: Spread, message: dict[str, object]) -> None:
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    spread.all.first(torch.tensor(len(data)))
    spread.all.first(data)


def _heard(spread: Spread) -> Any:
    n_bytes = torch.zeros((), dtype=torch.int64)
    spread.all.first(n_bytes)
    data = torch.empty(int(n_bytes), dtype=torch.uint8)
    spread.all.first(data)
    message = json.loads(data.numpy().tobytes())
    if "error" in message:
        error = UserError(message["error"])
        error.exit_code = message["exit_code"]
        raise error
    return message["made"]


@torch.no_grad()
def check_copies(spread: Spread, copies: Sequence[Tensor], advice: str) -> None:
    """Raises UserError on all processes if what each of them has a copy of is not the same to the bit everywhere.

    They add up the same numbers in the same order, so nothing but a fault can part them.
    """
    if spread.size == 1:
        return
    sums = torch.stack([copy.contiguous().view(torch.int32).sum() for copy in copies]).cpu()
    found = spread.all.gather(sums)
    if wrong := (found != found[0]).any(1).nonzero().flatten().tolist():
        raise UserError(
            f"the weights of rank {wrong[0]} are no longer those of rank 0, which a fault of memory or of a device "
            f"does; take the machines of both out of service, and {advice}"
        )


@contextmanager
def stopping_together(spread: Spread, lost: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """While it lasts, a signal that one process gets stops all of them at the end of the same step.

    They call what it gives after each step and between the runs that they finish, and there it raises StoppedTogether.
    Where `lost` says that a process is gone, a signal does what it did before.
    """
    if spread.size == 1:
        yield lambda: None
        return
    heard: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if lost():
            before[signal.Signals(number)](number, frame)

    def check() -> None:
        if not spread.all.count(len(heard), torch.empty(0)):
            return
        for number, handler in before.items():  # as if it had come just now, to all of them
            with suppress(KeyboardInterrupt):
                handler(number, None)
        raise StoppedTogether

    try:
        for number in before:
            signal.signal(number, hear)
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
