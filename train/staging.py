"""The way of one batch from files to float32 on the device, scaled there."""

import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cache_spec.layout import ACTIVATION
from train.readers import File, Reader

_SCRAP_BYTES = 512 << 10  # with twice as much in float32 it stays in a core's own cache until it is cast


class Segment(NamedTuple):
    """Rows of one file, given by number and rising, and their place in the batch."""

    file: File
    rows: np.ndarray
    at: int


class Stage(Protocol):
    """Where a thread makes one batch after another. `fill` each of its tensors, then `send` it."""

    def wait(self) -> None:
        """Return when the stage may be filled again."""
        ...

    def fill(self, which: int, width: int, segments: Iterable[Segment], reader: Reader, factor: float) -> None:
        """Read the rows of a tensor [batch, width]; `factor` is to turn stored values into training units."""
        ...

    def send(self, which: int) -> Tensor:
        """The tensor on the device, new: nobody writes into it as long as somebody has it."""
        ...

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Tensors made inside are ordered before the caller's work by `received`."""
        yield

    def received(self, tensors: Sequence[Tensor]) -> bool:
        """Let the caller's work use the tensors as soon as they are there; says whether they are there already."""
        ...


class DeviceStage:
    """Host buffers, used again and again: what is stored goes to the device as it is, to be cast and scaled there.

    On CUDA they are pinned, and what is made in `sending` runs on a stream of its own beside the training.
    """

    def __init__(self, n_rows: int, device: torch.device, stream: "torch.cuda.Stream | None") -> None:
        self._n_rows, self._device, self._stream = n_rows, device, stream
        self._sent = torch.cuda.Event() if stream is not None else None
        self._host: dict[int, Tensor] = {}
        self._factors: dict[int, float] = {}

    def wait(self) -> None:
        """As Stage says: the device has taken what was in the buffers."""
        if self._sent is not None:
            self._sent.synchronize()

    def fill(self, which: int, width: int, segments: Iterable[Segment], reader: Reader, factor: float) -> None:
        """As Stage says."""
        if which not in self._host or self._host[which].shape[1] != width:
            pinned = self._stream is not None
            self._host[which] = torch.empty(self._n_rows, width, dtype=torch.float16, pin_memory=pinned)
        buffer = self._host[which].numpy()
        for file, rows, at in segments:
            reader.read(file, rows, buffer[at : at + len(rows)])
        self._factors[which] = factor

    def send(self, which: int) -> Tensor:
        """As Stage says."""
        stored = self._host[which].to(self._device, non_blocking=self._stream is not None)
        return stored.to(torch.float32).mul_(self._factors[which])

    @contextmanager
    def sending(self) -> Iterator[None]:
        """As Stage says: they are made on the copy stream."""
        if self._stream is None or self._sent is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._sent.record()

    def received(self, tensors: Sequence[Tensor]) -> bool:
        """As Stage says; their memory is free only after the caller's work on them."""
        if self._stream is None or self._sent is None:
            return True
        ready = self._sent.query()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._sent)
        for tensor in tensors:
            tensor.record_stream(current)
        return ready


class HostStage:
    """Training on the CPU: a few rows at a time are read and, while the core has them at hand, cast and scaled."""

    def __init__(self, n_rows: int, memory: "Memory") -> None:
        self._n_rows, self._memory = n_rows, memory
        self._scrap: dict[int, np.ndarray] = {}
        self._made: dict[int, Tensor] = {}

    def wait(self) -> None:
        """As Stage says: at once, for it keeps nothing that it sent."""

    def fill(self, which: int, width: int, segments: Iterable[Segment], reader: Reader, factor: float) -> None:
        """As Stage says."""
        if width not in self._scrap:
            n_at_once = min(self._n_rows, max(1, _SCRAP_BYTES // (width * ACTIVATION.itemsize)))
            self._scrap[width] = np.empty((n_at_once, width), ACTIVATION)
        scrap, made = self._scrap[width], self._memory.tensor(self._n_rows, width)
        for file, rows, at in segments:
            for start in range(0, len(rows), len(scrap)):
                some = rows[start : start + len(scrap)]
                stored = scrap[: len(some)]
                reader.read(file, some, stored)
                made[at + start : at + start + len(some)].copy_(torch.from_numpy(stored)).mul_(factor)
        self._made[which] = made

    def send(self, which: int) -> Tensor:
        """As Stage says."""
        return self._made.pop(which)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """As Stage says."""
        yield

    def received(self, tensors: Sequence[Tensor]) -> bool:
        """As Stage says."""
        return True


class Memory:
    """float32 tensors in memory that is used again when nobody has them any more.

    What a system gives fresh it clears page by page, which took five times as long as filling it.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, int], deque[np.ndarray]] = defaultdict(deque)

    def tensor(self, n_rows: int, width: int) -> Tensor:
        """[n_rows, width] that holds anything."""
        free = self._free[n_rows, width]
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(n_rows, width).numpy()  # torch's, for its alignment
        own = memory.view()  # lives as long as any tensor, view or graph that uses its values
        weakref.finalize(own, free.append, memory).atexit = False
        return torch.from_numpy(own)


def copy_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """A stream to copy on beside the training; None where copying is nothing to wait for."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
