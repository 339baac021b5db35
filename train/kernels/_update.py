"""The update of an SAE from gradients that come a block of latents at a time: clipping, Adam, unit decoder rows.

What autograd and torch's optimiser would do in ten passes over the weights: each block's gradients are made, freed of
what points along the decoder rows and counted into the norm; then each block is updated and its rows made unit again.
Blocks are small enough that the allocator keeps their memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.kernels._sums import row_dots
from train.step import TrainRun

BLOCK = 4 << 20  # numbers of a weight matrix that are updated at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """The gradients of one block of latents."""

    start: int
    end: int
    W_enc: Tensor
    """[n, d_model]"""
    W_dec: Tensor
    """[n, d_out]"""


def blocks(d_sae: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, end) of blocks of latents."""
    size = max(1, BLOCK // width)
    for start in range(0, d_sae, size):
        yield start, min(start + size, d_sae)


class Update:
    """Takes a run's SAE one step further by Adam, whose moments stay in the run's optimiser."""

    def __init__(self, run: TrainRun) -> None:
        self._run = run

    def __call__(self, slices: list[Slices], vectors: dict[str, Tensor]) -> None:
        """`slices` cover all latents; `vectors` are the gradients of the other parameters by name.

        The gradients are used up.
        """
        run = self._run
        fixed = run.recipe.decoder == "unit"
        W_enc, W_dec = run.sae.W_enc.detach().t(), run.sae.W_dec.detach()
        if fixed:
            for each in slices:
                _project(each.W_dec, W_dec[each.start : each.end])
        scale = self._scale(slices, vectors)
        adam = self._adam({"W_enc", "W_dec", *vectors}, scale)
        for each in slices:
            part = slice(each.start, each.end)
            adam("W_enc", each.W_enc, lambda whole, part=part: whole.t()[part])
            adam("W_dec", each.W_dec, lambda whole, part=part: whole[part])
            if fixed:
                rows = W_dec[part]
                rows.div_(row_dots(rows, rows).sqrt_().unsqueeze(1))
        for name, gradient in vectors.items():
            adam(name, gradient, lambda whole: whole)
        assert W_enc.is_contiguous()
        run.sae.keep_threshold()

    def _scale(self, slices: list[Slices], vectors: dict[str, Tensor]) -> Tensor | None:
        """What gradients are divided by, so that together they are no longer than the recipe allows (a scalar)."""
        longest = self._run.recipe.clip_norm
        if longest is None:
            return None
        matrices = [matrix for each in slices for matrix in (each.W_enc, each.W_dec)]
        squares = [row_dots(matrix, matrix).sum() for matrix in matrices]
        squares += [vector.square().sum() for vector in vectors.values()]
        norm = torch.stack(squares).sum().sqrt()
        return ((norm + 1e-6) / longest).clamp(min=1.0).float()  # as torch.nn.utils.clip_grad_norm_ has it

    def _adam(self, names: set[str], scale: Tensor | None) -> Callable[..., None]:
        """A function (name, gradient, part of the parameter) that updates the part by torch's fused Adam."""
        run = self._run
        parameters = dict(run.sae.named_parameters())
        assert names == parameters.keys(), f"gradients for {sorted(names)}, parameters {sorted(parameters)}"
        states = {name: adam_state(run.optimizer, parameter) for name, parameter in parameters.items()}
        for state in states.values():
            state["step"] += 1
        beta1, beta2 = run.recipe.betas
        eps = run.optimizer.param_groups[0]["eps"]
        lr = run.lr

        def adam(name: str, gradient: Tensor, part: Callable[[Tensor], Tensor]) -> None:
            state = states[name]
            torch._fused_adam_(
                [part(parameters[name].detach())],
                [gradient],
                [part(state["exp_avg"])],
                [part(state["exp_avg_sq"])],
                [],
                [state["step"]],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
            )

        return adam


def _project(gradient: Tensor, rows: Tensor) -> None:
    """Take out what points along the rows: it would only change their length, which is fixed."""
    along = row_dots(gradient, rows) / row_dots(rows, rows)
    gradient.addcmul_(rows, along.unsqueeze(1), value=-1.0)


def adam_state(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's moments of a parameter, as the optimiser itself would start them."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
    return state
