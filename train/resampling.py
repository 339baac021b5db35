"""Neuron resampling: dead latents start again from rows that are badly reconstructed (Bricken et al. 2023)."""

import torch
from torch import Tensor

from cache_spec.seeds import derive_seed
from train.recipe import StepView
from train.sae import SparseAutoencoder
from train.step import TrainRun

ENCODER_SHARE = 0.2  # length of a new encoder direction, as a share of the living ones' mean length


@torch.no_grad()
def resample_dead(run: TrainRun, view: StepView) -> None:
    """At every `resample_every`-th step, while the learning rate has not begun to fall: too late to learn."""
    config, every = run.config, run.config.resample_every
    if not every or (run.n_done + 1) % every or run.n_done >= config.decay_start:
        return
    dead = run.silent_tokens >= every * len(view.x)  # since the last time, or since the start
    errors = (view.target - view.forward.reconstructions[-1]).square().sum(-1)
    seed = derive_seed("train/resample", config.seed, run.n_done)
    run.silent_tokens[resample(run.sae, run.optimizer, dead, view.x, view.target, errors, seed)] = 0


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    dead: Tensor,
    x: Tensor,
    target: Tensor,
    errors: Tensor,
    seed: int,
) -> Tensor:
    """Start dead latents again; gives their numbers.

    Each gets a row of its own, drawn with probability proportional to the square of the row's loss. The row's
    direction becomes the decoder row, of length 1, and the encoder column, 0.2 times as long as the living ones are on
    average; the latent's biases become 0, and Adam forgets it. Rows that are explained exactly are never drawn, and
    where there are more dead latents than rows the later ones have to wait. dead [d_sae] bool, x [batch, d_model],
    target [batch, d_out], errors [batch]: each row's squared error.
    """
    weights = errors.detach().double().cpu().square()
    latents = dead.nonzero().squeeze(1)[: int((weights > 0).sum())]
    if not len(latents) or not weights.isfinite().all():  # whoever watches the loss will see that it is not finite
        return latents[:0]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(weights, len(latents), generator=generator).to(x.device)
    lengths = sae.W_enc.norm(dim=0)
    living = lengths[~dead].mean() if int(dead.sum()) < sae.d_sae else lengths.mean()
    directions = torch.nn.functional.normalize(x[rows], dim=1)
    sae.W_enc[:, latents] = (ENCODER_SHARE * living * directions).t()
    sae.W_dec[latents] = torch.nn.functional.normalize(target[rows], dim=1)
    for vector in (sae.b_enc, sae.r_mag, sae.b_mag):
        if vector is not None:
            vector[latents] = 0.0
    _forget(sae, optimizer, latents)
    return latents


def _forget(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, latents: Tensor) -> None:
    """Set the latents' first and second moments to zero."""
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.r_mag, sae.b_mag):
        if parameter is None:
            continue
        for name in ("exp_avg", "exp_avg_sq"):
            moments = optimizer.state[parameter][name]
            (moments.t() if parameter is sae.W_enc else moments)[latents] = 0.0
