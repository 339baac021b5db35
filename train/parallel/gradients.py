"""Gradients of an SAE whose training is spread over processes: put together, and clipped as one."""

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from train.sae import SparseAutoencoder


@torch.no_grad()
def combine_gradients(sae: SparseAutoencoder) -> None:
    """After a backward pass: average gradients over rows, and add up what each share of the latents has of b_dec's."""
    rows, latents = sae.spread.rows, sae.spread.latents
    if latents.size > 1:
        latents.add_up([gradient_of(parameter) for parameter in _shared(sae)])
    if rows.size > 1:
        gradients = [gradient_of(parameter) for parameter in sae.parameters()]
        rows.add_up(gradients)
        torch._foreach_div_(gradients, rows.size)


@torch.no_grad()
def clip_gradients(sae: SparseAutoencoder, most: float) -> None:
    """Shorten the gradients of all parameters together to a length of `most`, wherever the latents are."""
    parameters = list(sae.parameters())
    if sae.spread.latents.size == 1:
        torch.nn.utils.clip_grad_norm_(parameters, most)
        return
    shared = _shared(sae)
    own = [gradient_of(parameter) for parameter in parameters if not any(parameter is each for each in shared)]
    squared = sae.spread.latents.total(get_total_norm(own).square())
    length = (squared + get_total_norm([gradient_of(parameter) for parameter in shared]).square()).sqrt()
    clip_grads_with_norm_(parameters, most, length)


def copies(sae: SparseAutoencoder) -> list[torch.nn.Parameter]:
    """The parameters that several processes have whole: all, or where latents are spread those that belong to none."""
    return list(sae.parameters()) if sae.spread.rows.size > 1 else _shared(sae)


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Its gradient; a process on which nothing depends on the parameter has zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _shared(sae: SparseAutoencoder) -> list[torch.nn.Parameter]:
    """The parameters that every process has whole, where latents are spread."""
    return [sae.b_dec] if sae.W_skip is None else [sae.b_dec, sae.W_skip]  # pyright: ignore[reportReturnType]
