"""What the benchmarks of training are asked for, read from their options; and the machine that they run on."""

import os
import platform
from pathlib import Path

import torch

from benchmarks.peers.job import Job
from cache_spec.errors import UserError
from train.names import available, find

PRECISIONS = ("fp32", "bf16")
LR, LR_DEAD, LR_JUMPRELU = 3e-4, 1e-5, 7e-5  # with a high rate the dead would come to life, and JumpReLU's L0 run away


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """`512,8192,32,2048` -> d_model, d_sae, k, batch. Raises UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--shape is '{text}'; give d_model,d_sae,k,batch such as 512,8192,32,2048")
    d_model, d_sae, k, batch = map(int, parts)
    if k > d_sae:
        raise UserError(f"--shape is '{text}' with k {k} above d_sae {d_sae}; give d_model,d_sae,k,batch")
    return d_model, d_sae, k, batch


def parse_names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """`a,b` -> [a, b]. Raises UserError for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name} is unknown; it is one of {', '.join(known)}")
    return names


def make_job(arch: str, shape: str, precision: str, device: str, dead: float = 0.0) -> Job:
    """A training step of ours. Raises UserError for an option that makes none."""
    parse_names("--arch", arch, tuple(available("architectures")))
    parse_names("--precision", precision, PRECISIONS)
    d_model, d_sae, k, batch = parse_shape(shape)
    return Job(
        contestant="granary",
        arch=arch,
        d_model=d_model,
        d_sae=d_sae,
        k=k,
        batch=batch,
        precision=precision,
        device=device,
        dead=dead,
        lr=LR_DEAD if dead else LR_JUMPRELU if arch == "jumprelu" else LR,
    )


def parse_kernels(text: str, device: str) -> list[str]:
    """Kernels by name; all that the device can run if none is named."""
    known = tuple(available("kernels"))
    runnable = [name for name in known if not find("kernels", name).unavailable(device)]
    return parse_names("--kernel", text, known) if text else runnable


def describe(job: Job) -> str:
    """`topk, fp32: d_model 512, d_sae 8192, k 32, batch 2048, 10% dead`"""
    dead = f", {job.dead:.0%} dead" if job.dead else ""
    return f"{job.arch}, {job.precision}: d_model {job.d_model}, d_sae {job.d_sae}, k {job.k}, batch {job.batch}{dead}"


def machine(device: str) -> str:
    """Processor, cores and what they can, and the GPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(":")[1] for line in lines if line.startswith("model name")), platform.processor())
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{name.strip()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}"
