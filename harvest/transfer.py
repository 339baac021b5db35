"""Between the host and the model's device, without making either wait for the other."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Sent(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> list[np.ndarray]:
        """Return when all are there."""
        ...


class Copies(Protocol):
    """How tensors get to the host. `depth` is how many batches may be under way while another one is put away."""

    depth: int

    def send(self, tensors: list[Tensor]) -> Sent:
        """Begin the copy, and do not wait for it."""
        ...


def choose_copies(device: torch.device) -> Copies:
    """Copies beside the computation on a CUDA device; plain ones elsewhere."""
    return CudaCopies(device) if device.type == "cuda" else PlainCopies()


class PlainCopies:
    """For a CPU, where there is nothing to copy, and for devices that copy when asked."""

    depth = 0

    def send(self, tensors: list[Tensor]) -> Sent:
        return _Arrived([tensor.cpu().numpy() for tensor in tensors])


@dataclass(frozen=True)
class _Arrived:
    arrays: list[np.ndarray]

    def wait(self) -> list[np.ndarray]:
        return self.arrays


class CudaCopies:
    """Copies on a stream of their own into page-locked memory. The host waits for a batch only when two later ones
    are queued, so that the GPU never waits for the host."""

    depth = 2

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, tensors: list[Tensor]) -> Sent:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event(blocking=True)  # a waiting thread sleeps, and leaves its core to the writer
        with torch.cuda.stream(self._stream):
            # torch keeps page-locked memory for the next batch, once its copy is done and nobody holds the tensor.
            host = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
            event.record(self._stream)
        return _OnStream(tensors, host, event)


@dataclass(frozen=True)
class _OnStream:
    tensors: list[Tensor]  # held until the copy is done: the other stream must not reuse their memory
    host: list[Tensor]
    event: torch.cuda.Event

    def wait(self) -> list[np.ndarray]:
        self.event.synchronize()
        return [tensor.numpy() for tensor in self.host]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; only page-locked memory is copied there without waiting for what the device does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
