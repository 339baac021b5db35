"""Large buffers that a step writes anew each time, kept from step to step.

On a CPU memory of more than 32 MiB goes back to the system when it is freed and comes again page by page, which takes
longer than what is done with it. The runs that one thread trains in turn share its buffers.
"""

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that holds anything; the next one of this name, in this thread, may be the same memory."""
    if device.type != "cpu":  # its allocator keeps memory by itself
        return torch.empty(shape, dtype=dtype, device=device)
    buffers: dict[tuple[str, torch.dtype], Tensor] = vars(_kept).setdefault("buffers", {})
    n = math.prod(shape)
    found = buffers.get((name, dtype))
    if found is None or found.numel() < n:
        found = buffers[name, dtype] = torch.empty(n, dtype=dtype)
    return found[:n].view(shape)
