"""What each contestant of benchmarks.step gets, what it is, and the rows that all of them train on.

This folder runs in the peers' environments too: it imports torch and, in one file each, a contestant's own library.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

DEAD_TOKENS = 10_000_000  # every library's own default
SHRUNK = 0.01  # a dead latent's encoder, beside its start: positive at times, never among the k largest


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training step to be timed. Facts only."""

    contestant: str
    """The file in this folder."""
    variant: str = ""
    """Kernel, optimiser or floor, where the file has several."""
    source: str = ""
    """Folder of a peer's checkout, where it is no package of the environment."""
    arch: str
    d_model: int
    d_sae: int
    k: int
    batch: int
    precision: str
    """fp32 or bf16."""
    device: str
    dead: float = 0.0
    """Share of the latents that are dead, so that AuxK has work."""
    n_batches: int = 4
    lr: float = 3e-4


class Unsuitable(ValueError):
    """A contestant has nothing like the job; the message says what it lacks."""


class Contestant(Protocol):
    """A library's SAE in training."""

    settings: str
    """What a reader has to know to judge the row."""
    versions: dict[str, str]

    def step(self, x: Tensor) -> object:
        """One training step on rows [batch, d_model]."""
        ...

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, whose positive entries count as active, and reconstruction of rows, as in training."""
        ...

    def n_dead(self) -> int:
        """Latents that it takes for dead."""
        ...


def n_dead(job: Job) -> int:
    """Dead latents."""
    return round(job.dead * job.d_sae)


def first_step(job: Job) -> int:
    """The step to begin with: warm-ups are over, and a latent can have been silent for DEAD_TOKENS."""
    return DEAD_TOKENS // job.batch + 1


def n_steps(job: Job) -> int:
    """What schedules are laid out for; a benchmark stops long before."""
    return 10 * first_step(job)


def autocast(job: Job) -> AbstractContextManager[object]:
    """bf16 products, where that is the job."""
    return torch.autocast(torch.device(job.device).type, dtype=torch.bfloat16, enabled=job.precision == "bf16")


def use_tensor_cores(job: Job) -> None:
    """Products of fp32 in TF32 on a GPU, which these libraries recommend or set."""
    if job.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def shares_of_prefixes() -> list[float]:
    """The five groups of a matryoshka SAE, as shares of its latents."""
    return [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]


def threshold_for(pre: Tensor, k: int) -> float:
    """What leaves k of each row's pre-activations [batch, d_sae] on average.

    A JumpReLU starts with thousands of active latents and is thinned out in its first thousands of steps; the steps
    worth timing are the many after that.
    """
    flat = pre.flatten()
    return flat.kthvalue(flat.numel() - k * len(pre)).values.item()


def made_up_batches(job: Job) -> list[Tensor]:
    """Rows [batch, d_model] of mean squared length 1: k sparse directions each, a common offset, a little noise.

    The same in every process. Few directions are frequent, as in a language model's activations.
    """
    generator = torch.Generator().manual_seed(0)
    n_directions = 4 * job.d_model
    directions = functional.normalize(torch.randn(n_directions, job.d_model, generator=generator), dim=1)
    frequency = (torch.arange(n_directions) + 10.0) ** -0.7
    offset = torch.randn(job.d_model, generator=generator) / job.d_model**0.5
    batches = []
    for _ in range(job.n_batches):
        latents = torch.multinomial(
            frequency.expand(job.batch, -1), min(job.k, n_directions), replacement=True, generator=generator
        )
        codes = 0.5 + torch.empty(latents.shape).exponential_(generator=generator)
        rows = functional.embedding_bag(latents, directions, mode="sum", per_sample_weights=codes)
        noise = torch.randn(rows.shape, generator=generator) / job.d_model**0.5
        rows = rows + rows.square().sum(1).mean().sqrt() * (0.3 * offset + 0.1 * noise)
        batches.append((rows / rows.square().sum(1).mean().sqrt()).to(job.device))
    return batches
