"""The choice of a kernel: made once, aloud."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from train.names import find
from train.recipe import Forward
from train.sae import SparseAutoencoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """A name and a function (sae, x [batch, d_model]) -> Forward."""

    name: str
    forward: Callable[[SparseAutoencoder, Tensor], Forward]


def select(name: str, device: str) -> Kernel:
    """The kernel of that name; with "auto" the best for the device. Raises UserError for an unknown name."""
    if name == "auto":
        name = "dense"  # the only one so far, on every device
        _log.info("kernel: dense (auto, on %s)", device)
    return Kernel(name, find("kernels", name).forward)
