"""The way of one batch from files to float32 on the device, scaled there."""

import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.readers import File, Reader


class Segment(NamedTuple):
    """Rows of one file, given by number and rising, and their place in the batch."""

    file: File
    rows: np.ndarray
    at: int


def read_segments(segments: Iterable[Segment], reader: Reader, out: Tensor) -> None:
    """Read the rows of a tensor into memory of the host, fp16 [batch, width]."""
    buffer = out.numpy()
    for file, rows, at in segments:
        reader.read(file, rows, buffer[at : at + len(rows)])


class Stage:
    """Where a thread makes one batch after another: `fill` each of its tensors, then `send` it.

    Its host buffers, one fp16 [batch, width] a tensor, are used again and again. What is stored goes to the device as
    it is, to be cast and scaled there. On CUDA the buffers are pinned, and what is made in `sending` runs on a stream
    of its own beside the training.
    """

    def __init__(self, n_rows: int, device: torch.device, stream: "torch.cuda.Stream | None", memory: "Memory") -> None:
        self._n_rows, self._device, self._stream, self._memory = n_rows, device, stream, memory
        self._sent = torch.cuda.Event() if stream is not None else None
        self._host: dict[int, Tensor] = {}
        self._factors: dict[int, float] = {}

    def wait(self) -> None:
        """Return when the buffers may be filled again: the device has taken what was in them."""
        if self._sent is not None:
            self._sent.synchronize()

    def fill(self, which: int, width: int, segments: Iterable[Segment], reader: Reader, factor: float) -> None:
        """Read the rows of a tensor; `factor` is to turn stored values into training units."""
        read_segments(segments, reader, self._buffer(which, width))
        self._factors[which] = factor

    def take(self, which: int, stored: Tensor, factor: float) -> None:
        """Take the rows of a tensor that were read elsewhere; they have to stay there until they are sent."""
        if self._stream is None:
            self._host[which] = stored
        else:  # by way of memory that is pinned
            self._buffer(which, stored.shape[1]).copy_(stored)
        self._factors[which] = factor

    def _buffer(self, which: int, width: int) -> Tensor:
        if which not in self._host or self._host[which].shape[1] != width:
            pinned = self._stream is not None
            self._host[which] = torch.empty(self._n_rows, width, dtype=torch.float16, pin_memory=pinned)
        return self._host[which]

    def send(self, which: int) -> Tensor:
        """A tensor on the device, as float32: new, so that nobody writes into it as long as somebody has it."""
        stored = self._host[which]
        if self._device.type == "cpu":
            made = self._memory.tensor(*stored.shape).copy_(stored)
        else:
            made = stored.to(self._device, non_blocking=self._stream is not None).to(torch.float32)
        return made.mul_(self._factors[which])

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Tensors made inside are made on the copy stream; `received` orders them before the caller's work."""
        if self._stream is None or self._sent is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._sent.record()

    def received(self, tensors: Sequence[Tensor]) -> bool:
        """Let the caller's work use the tensors as soon as they are there, and free them only after it.

        Says whether they are there already.
        """
        if self._stream is None or self._sent is None:
            return True
        ready = self._sent.query()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._sent)
        for tensor in tensors:
            tensor.record_stream(current)
        return ready


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
