"""Ours: a TrainRun with one of train/kernels."""

from dataclasses import fields
from typing import Any

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
from train.config import RunConfig
from train.kernels import select
from train.report import keep_freed_memory
from train.step import TrainRun


class Granary:
    """A run as `python -m train` steps it."""

    def __init__(self, run: TrainRun, settings: str) -> None:
        self.settings, self.versions, self._run = settings, {"torch": torch.__version__}, run

    def step(self, x: Tensor) -> object:
        return self._run.step(x, x)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Not through the kernel: what is reported of it must not depend on it."""
        sae = self._run.sae
        pre = sae.pre_activations(x)
        codes = sae.codes(pre, sae.activation.train(pre, sae.threshold)[0])
        return codes, sae.decode(codes)


def build(job: Job, x: Tensor) -> Granary:
    keep_freed_memory()  # as training does
    config = config_of(job)
    try:
        kernel = select(job.variant, torch.device(job.device).type)
    except UserError as error:
        raise Unsuitable(str(error)) from None
    run = TrainRun(config, job.d_model, n_steps(job), kernel, device=job.device)
    run.start_at(x)
    prepare(run, job, x)
    return Granary(run, f"kernel {job.variant}, as python -m train runs it")


def config_of(job: Job) -> RunConfig:
    """The run of `python -m train` that this is."""
    if job.precision != "fp32" and "precision" not in {field.name for field in fields(RunConfig)}:
        raise Unsuitable(f"train has no --precision {job.precision}")
    more: dict[str, Any] = {} if job.precision == "fp32" else {"precision": job.precision}
    return RunConfig(
        name="benchmark",
        arch=job.arch,
        d_sae=job.d_sae,
        k=job.k,
        lr=job.lr,
        warmup_steps=0,
        decay_start=n_steps(job) * 4 // 5,
        sparsity_warmup_steps=0,
        threshold_start=0,
        threshold_beta=0.999,
        dead_tokens=DEAD_TOKENS,
        **more,
    )


@torch.no_grad()
def prepare(run: TrainRun, job: Job, x: Tensor) -> None:
    """Put it where a run is after a while: some latents dead, JumpReLU's thresholds where L0 is k."""
    sae, run.n_done = run.sae, first_step(job)
    if dead := n_dead(job):
        sae.W_enc[:, -dead:] *= SHRUNK
        run.silent_tokens[-dead:] = 2 * DEAD_TOKENS
    if job.arch == "jumprelu":
        assert sae.threshold is not None
        sae.threshold.fill_(threshold_for(sae.pre_activations(x), job.k))
