"""A part of a step that is launched as one CUDA graph."""

from collections.abc import Callable

import torch


class Phase:
    """Calls a function of fixed shapes that never waits for the device: the first time as it is, then as a graph.

    The first call compiles the kernels, which a capture must not do. On other devices every call is a plain one.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._n_calls = 0

    def __call__(self) -> None:
        self._n_calls += 1
        if self._device.type != "cuda" or self._n_calls == 1:
            self._function()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # threads that read ahead may allocate meanwhile, which is no matter of this capture
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._function()
        self._graph.replay()
