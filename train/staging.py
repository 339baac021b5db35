"""The way of one batch from host buffers to float32 on the device, scaled there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Stage:
    """Host buffers for the rows of one batch, used again and again: one [batch, width] fp16 for each width.

    On CUDA they are pinned, and what is made in `sending` runs on a stream of its own beside the training.
    """

    def __init__(self, n_rows: int, widths: Sequence[int], device: torch.device, stream: "torch.cuda.Stream | None"):
        pinned = stream is not None
        self._host = [torch.empty(n_rows, width, dtype=torch.float16, pin_memory=pinned) for width in widths]
        self.buffers: list[np.ndarray] = [tensor.numpy() for tensor in self._host]
        self._device, self._stream = device, stream
        self._sent = torch.cuda.Event() if stream is not None else None

    def wait(self) -> None:
        """Return when the buffers may be filled again: the device has taken what was in them."""
        if self._sent is not None:
            self._sent.synchronize()

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Tensors made inside are made on the copy stream; `received` orders them before the caller's work."""
        if self._stream is None or self._sent is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._sent.record()

    def to_device(self, which: int, scale: float) -> Tensor:
        """One buffer as a new float32 tensor on the device, times the scale."""
        pinned = self._stream is not None
        return self._host[which].to(self._device, non_blocking=pinned).to(torch.float32).mul_(scale)

    def received(self, tensors: Sequence[Tensor]) -> None:
        """Let the caller's stream use the tensors as soon as they are there, and free them only after that."""
        if self._stream is None or self._sent is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._sent)
        for tensor in tensors:
            tensor.record_stream(current)


def copy_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """A stream to copy on beside the training; None where copying is nothing to wait for."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
