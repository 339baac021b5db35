"""How one SAE's training is spread over processes: over the rows of a batch, over the latents, or not at all.

Everything here is exact, and does nothing where there is one process: a tensor comes back as it went in.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Processes that hold equal parts of one thing; `index` is the place of this one among them."""

    size: int = 1
    index: int = 0
    group: Any = None  # a ProcessGroup, which not every build of torch has

    def share(self, n: int) -> slice:
        """This process's part of `n` things."""
        assert n % self.size == 0
        return slice(self.index * n // self.size, (self.index + 1) * n // self.size)

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes. Its gradient is the part's: what comes after is the same on every process."""
        return part if self.size == 1 else _Total.apply(part, self.group)  # pyright: ignore[reportReturnType]

    def mean(self, part: Tensor) -> Tensor:
        """The mean over the processes, with the gradient of `part`: gradients are averaged later, all at once."""
        if self.size == 1:
            return part
        return _Total.apply(part / self.size, self.group, self.size)  # pyright: ignore[reportReturnType]

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by the sum over the processes, in place: one message for all of them."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view(tensor.shape))

    @torch.no_grad()
    def least(self, value: Tensor) -> Tensor:
        """The smallest over the processes, element by element."""
        return self._reduced(value, dist.ReduceOp.MIN) if self.size > 1 else value

    @torch.no_grad()
    def largest(self, value: Tensor) -> Tensor:
        """The largest over the processes, element by element."""
        return self._reduced(value, dist.ReduceOp.MAX) if self.size > 1 else value

    @torch.no_grad()
    def any(self, flags: Tensor) -> Tensor:
        """Which flags are set on any process."""
        return flags if self.size == 1 else self.largest(flags.to(torch.uint8)).bool()

    def count(self, n: int, like: Tensor) -> int:
        """The sum of a number over the processes; the message goes where the tensor `like` is."""
        return n if self.size == 1 else int(self._reduced(torch.tensor(n, device=like.device), dist.ReduceOp.SUM))

    @torch.no_grad()
    def gather(self, part: Tensor) -> Tensor:
        """[...] -> [size, ...]: the parts of all, the same shape on each."""
        if self.size == 1:
            return part.unsqueeze(0)
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.stack(parts)

    @torch.no_grad()
    def first(self, tensor: Tensor) -> None:
        """Replace a tensor by the first process's, in place."""
        if self.size > 1:
            sent = tensor.contiguous()
            dist.broadcast(sent, group=self.group, group_src=0)
            tensor.copy_(sent)

    def _reduced(self, value: Tensor, how: Any) -> Tensor:
        reduced = value.detach().clone()
        dist.all_reduce(reduced, how, group=self.group)
        return reduced


class _Total(torch.autograd.Function):
    """A sum over processes; the gradient goes through, times a factor."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any, factor: int = 1) -> Tensor:
        ctx.factor = factor
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.factor, None, None


@dataclass(frozen=True)
class Spread:
    """Over which processes the rows of each batch are spread, and over which the latents."""

    rows: Axis = Axis()
    latents: Axis = Axis()
    all: Axis = Axis()
    """Every process, for a few numbers on the CPU; tensors on a GPU go another way."""

    @property
    def size(self) -> int:
        return self.rows.size * self.latents.size

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.all.index == 0

    def __str__(self) -> str:
        """What run.json says: "alone", "data over 4 processes"."""
        parts = [("data", self.rows.size), ("latents", self.latents.size)]
        return " and ".join(f"{what} over {n} processes" for what, n in parts if n > 1) or "alone"


ALONE = Spread()
