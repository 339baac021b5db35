"""What a kernel is: the way in which the steps of a run are computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from train.config import RunConfig
from train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one step tells: all as it was before its update, and on the device."""

    loss: Tensor
    """A scalar, penalties included."""
    reconstruction: Tensor
    """[batch, d_out], from all latents; where rows are spread over processes, of this process's rows."""
    n_active: Tensor
    """Codes above 0 in the batch, a scalar."""
    smallest: Tensor | None
    """The smallest active code, a scalar, where a running threshold wants it."""


class Engine(Protocol):
    """The steps of one run, and what has to be kept between them beside the run's own state."""

    def step(self, x: Tensor, target: Tensor, twin: Tensor | None, paired: Tensor | None) -> Outcome:
        """Forward, gradients and update on rows [batch, d_model] with targets [batch, d_out]; see TrainRun.step."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that the next step depends on, by names that start with "kernel."."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up `state` as far as it is there: another kernel may have made the checkpoint."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides whether a kernel can train a run, and whether it is the fastest."""

    recipe: Recipe
    config: RunConfig
    d_model: int
    d_out: int
    batch_size: int


@dataclass(frozen=True)
class Kernel:
    """A name and a function that makes a TrainRun's engine; `why` is the reason of a choice that was left to us."""

    name: str
    engine: Callable[[Any], Engine]
    why: str = ""
