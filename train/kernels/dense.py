"""The plain kernel: dense matrix products and autograd. The others are compared with it."""

import torch
from torch import Tensor

from train.engine import Job, Outcome
from train.losses import inconsistency, nested_error
from train.parallel.axis import Spread
from train.parallel.gradients import clip_gradients, combine_gradients
from train.recipe import Forward, StepView
from train.resampling import resample_dead
from train.sae import SparseAutoencoder
from train.spans import DECODE, ENCODE, GRADIENTS, SELECT, UPDATE, span
from train.step import TrainRun


def unavailable(device: str) -> str:
    """Why it cannot run on a device; empty: it runs on all."""
    return ""


def refusal(job: Job) -> str:
    """Why it cannot train a run; empty: it can train all."""
    return ""


def engine(run: TrainRun) -> "Dense":
    return Dense(run)


def forward(sae: SparseAutoencoder, x: Tensor) -> Forward:
    """One training forward pass over rows [batch, d_model]."""
    with span(ENCODE):
        pre = sae.pre_activations(x)
    with span(SELECT):
        active, smallest = sae.activation.train(pre, sae.threshold, sae.spread)
        f = sae.codes(pre, active)
    gate = None if sae.r_mag is None else active
    with span(DECODE):
        return Forward(f=f, reconstructions=sae.decode_prefixes(f, x), smallest=smallest, gate=gate)


def _of_the_batch(spread: Spread, loss: Tensor, n_active: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the active codes of this process's rows and latents -> those of the whole batch and SAE."""
    if spread.size == 1:
        return loss, n_active
    both = torch.stack([loss.double() / spread.size, n_active.double()])  # where latents are spread, all have the loss
    spread.rows.add_up([both])
    spread.latents.add_up([both])
    return both[0].to(loss.dtype), both[1].to(n_active.dtype)


class Dense:
    """Steps by autograd. With bf16 the products run in it, under autocast; losses and weights stay in float32."""

    def __init__(self, run: TrainRun) -> None:
        self._run = run

    def step(self, x: Tensor, target: Tensor, twin: Tensor | None, paired: Tensor | None) -> Outcome:
        """As Engine says."""
        run, spread = self._run, self._run.spread
        own = spread.rows.share(len(x))
        x, target = x[own], target[own]
        twin, paired = (None if rows is None else rows[own] for rows in (twin, paired))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
            made = forward(run.sae, x)
            with span(DECODE):
                view = self._view(x, target, made)
                loss = nested_error(made.reconstructions, target)
                for penalty, coefficient in run.penalties:
                    loss = loss + coefficient * penalty(view)
                if run.config.consistency:
                    assert twin is not None
                    assert paired is not None
                    loss = loss + run.config.consistency * inconsistency(run.sae, made.f, twin, paired)
        with span(GRADIENTS):
            loss.backward()
        with span(UPDATE):
            self._update()
        run.observe(view)
        resample_dead(run, view)
        loss, n_active = _of_the_batch(spread, loss.detach(), (made.f.detach() > 0).sum())
        return Outcome(
            loss=loss,
            reconstruction=made.reconstructions[-1].detach().to(target.dtype),
            n_active=n_active,
            smallest=None if made.smallest is None else made.smallest.to(target.dtype),
        )

    def _view(self, x: Tensor, target: Tensor, made: Forward) -> StepView:
        run, config = self._run, self._run.config
        with torch.no_grad():
            fired = run.spread.rows.any(made.f.amax(0) > 0)
            dead = run.count_silence(fired, len(x) * run.spread.rows.size)
        return StepView(
            sae=run.sae,
            x=x,
            target=target,
            forward=made,
            dead=dead,
            sparsity_scale=run.sparsity_scale,
            k=config.k,
            decoder=run.recipe.decoder,
            aux_k=config.aux_k,
            p=1.0 if run.annealing is None else run.annealing.p(run.n_done),
            p_rescale=1.0 if run.annealing is None else run.annealing.rescale,
        )

    @torch.no_grad()
    def _update(self) -> None:
        run = self._run
        W_dec, fixed = run.sae.W_dec, run.recipe.decoder == "unit"
        combine_gradients(run.sae)
        if fixed:
            gradient = W_dec.grad
            assert gradient is not None
            # the part of the gradient along a decoder row would only change its length, which is fixed
            along = (gradient * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True)
            gradient.addcmul_(W_dec, along, value=-1.0)
        if run.recipe.clip_norm is not None:
            clip_gradients(run.sae, run.recipe.clip_norm)
        run.optimizer.param_groups[0]["lr"] = run.lr
        run.optimizer.step()
        run.optimizer.zero_grad()
        if fixed:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        run.sae.keep_threshold()

    def state(self) -> dict[str, Tensor]:
        """Nothing: the run's own state is all."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to take up."""
