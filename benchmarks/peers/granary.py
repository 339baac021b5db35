"""Ours: a TrainRun with one of train/kernels."""

import torch
from torch import Tensor

from benchmarks.peers.job import (
    DEAD_TOKENS,
    SHRUNK,
    Job,
    Unsuitable,
    first_step,
    n_dead,
    n_steps,
    threshold_for,
)
from cache_spec.errors import UserError
from train import engine
from train.config import RunConfig
from train.kernels import select
from train.report import keep_freed_memory
from train.step import TrainRun, recipe_of


class Granary:
    """A run as `python -m train` steps it."""

    def __init__(self, run: TrainRun, settings: str) -> None:
        self.settings, self.versions, self._run = settings, {"torch": str(torch.__version__)}, run

    def step(self, x: Tensor) -> object:
        return self._run.step(x, x)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Not through the kernel: what is reported of it must not depend on it."""
        sae = self._run.sae
        pre = sae.pre_activations(x)
        codes = sae.codes(pre, sae.activation.train(pre, sae.threshold)[0])
        return codes, sae.decode(codes)

    def n_dead(self) -> int:
        return int(self._run.dead().sum())


def build(job: Job, x: Tensor) -> Granary:
    keep_freed_memory()  # as training does
    config = config_of(job)
    whole = engine.Job(
        recipe=recipe_of(config), config=config, d_model=job.d_model, d_out=job.d_model, batch_size=job.batch
    )
    try:
        kernel = select(job.variant, job.device, whole)
    except UserError as error:
        raise Unsuitable(str(error)) from None
    run = TrainRun(config, job.d_model, n_steps(job), kernel, device=job.device)
    run.start_at(x)
    put_midway(run, job, x)
    return Granary(run, f"--kernel {job.variant} --precision {job.precision}, as python -m train steps it")


def config_of(job: Job) -> RunConfig:
    """The run of `python -m train` that this is."""
    return RunConfig(
        name="benchmark",
        arch=job.arch,
        d_sae=job.d_sae,
        k=job.k,
        precision=job.precision,
        lr=job.lr,
        warmup_steps=0,
        decay_start=n_steps(job) * 4 // 5,
        sparsity_warmup_steps=0,
        threshold_start=0,
        threshold_beta=0.999,
        dead_tokens=DEAD_TOKENS,
    )


@torch.no_grad()
def put_midway(run: TrainRun, job: Job, x: Tensor) -> None:
    """Where a run is after a while: some latents dead, JumpReLU's thresholds where L0 is k. As from a checkpoint, so
    that a kernel's own copies follow."""
    with torch.enable_grad():
        run.step(x, x)  # there is no checkpoint before the first
    tensors = {name: tensor.clone() for name, tensor in run.state().items()}
    if dead := n_dead(job):
        tensors["sae.W_enc"][:, -dead:] *= SHRUNK
        tensors["silent_tokens"][-dead:] = 2 * DEAD_TOKENS
    if job.arch == "jumprelu":
        tensors["sae.threshold"].fill_(threshold_for(run.sae.pre_activations(x), job.k))
    run.restore(tensors, first_step(job))
