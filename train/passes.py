"""The memory plan: what a sweep needs, what the machine has free, and how many passes over the cache that makes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from cache_spec.counts import parse_bytes
from cache_spec.errors import UserError
from train.activations import JumpReLU
from train.choosing import job_of, kernel_of
from train.config import RunConfig
from train.held_out import MAX_ROWS
from train.loader import MixedBatchLoader
from train.parallel.axis import ALONE, Spread
from train.step import penalties_of

_STATE_BYTES = 16  # a parameter's weight, gradient and two moments in float32
_SAVED_BYTES = 12  # of these, what a checkpoint being written holds once more, on the host
# What a step holds at its peak, by the resident memory of a process of its own, with freed memory kept as in training,
# at (d_model, d_sae, k, batch) = (128, 8192, 80, 2048) and (512, 4096, 40, 4096), less the state above.
_DENSE_COPIES = 10  # [batch, d_sae] float32 tensors; measured: topk 8.6 and 9.5, matryoshka 9.9, jumprelu in bf16 9.8
_PRE_ACTIVATIONS = 1  # such tensors that a sparse step keeps, a thread
_DEAD_COPIES = 2  # of auxk with a quarter of the latents dead; measured: 4 and 8 times the share that is dead
_ROW_COPIES = 16  # [batch, d_out] float32 tensors
_ENTRY_BYTES, _GROUPED_ENTRY_BYTES = (
    900,
    1200,
)  # a code that is on, with one prefix and with several; measured: topk 650,
# batchtopk 740 (of 80 codes a row; 440 of 240), in bf16 890, matryoshka 1110
_SMALL_STEP = 5e9  # floating-point operations below which one thread is the fastest
USABLE = 90  # percent of what is free; the rest is for what nobody planned
_GIB = 2**30


def n_parameters(config: RunConfig, d_model: int, d_out: int) -> int:
    """Of one SAE: encoder, decoder, biases, and three numbers a latent for thresholds or gates."""
    skip = d_model * d_out if config.skip else 0
    return config.d_sae * (d_model + d_out + 3) + d_out + skip


def threads_of(config: RunConfig, loader: MixedBatchLoader, n_threads: int) -> int:
    """Threads that one step gets on a CPU: one if it is small, else all.

    Neither depends on how many SAEs train beside it, for the number of threads decides how sums are rounded.
    """
    n_operations = 6 * loader.data.batch_size * config.d_sae * (loader.hook.d_model + loader.d_out)
    return 1 if n_operations < _SMALL_STEP else n_threads


def step_cost(config: RunConfig, loader: MixedBatchLoader, kernel: str) -> float:
    """Floating-point operations of one step, roughly: to spread runs by, which changes no result."""
    batch, d_in, d_out = loader.data.batch_size, loader.hook.d_model, loader.d_out
    if kernel == "dense":
        return 6.0 * batch * config.d_sae * (d_in + d_out)
    return 2.0 * batch * config.d_sae * d_in + 6.0 * batch * config.k * (d_in + d_out)


def state_bytes(config: RunConfig, loader: MixedBatchLoader, spread: Spread = ALONE) -> int:
    """What one SAE in training holds from step to step, here of its shares."""
    return _STATE_BYTES * n_parameters(config, loader.hook.d_model, loader.d_out) // spread.latents.size


def step_bytes(config: RunConfig, loader: MixedBatchLoader, kernel: str, spread: Spread = ALONE) -> int:
    """What one step holds beside the state at its peak, with the kernel of that name: dense, or one like sparse."""
    batch, recipe = loader.data.batch_size // spread.rows.size, job_of(config, loader).recipe
    rows = 4 * batch * loader.d_out
    copies = _PRE_ACTIVATIONS + (_DEAD_COPIES if penalties_of(config, recipe).get("auxk") else 0)
    entry = _GROUPED_ENTRY_BYTES if len(recipe.prefixes) > 1 else _ENTRY_BYTES
    sparse = 4 * batch * copies * config.d_sae + entry * batch * config.k + _ROW_COPIES * rows
    dense = 4 * batch * _DENSE_COPIES * config.d_sae // spread.latents.size + 4 * rows
    if kernel == "dense":
        return dense
    return sparse + (dense if isinstance(recipe.activation, JumpReLU) else 0)  # its first steps are dense


@dataclass(frozen=True)
class _Need:
    """Bytes of one SAE, from step to step and in a step."""

    state: int
    step: int


def _need(config: RunConfig, loader: MixedBatchLoader, kernel: str, spread: Spread) -> _Need:
    saved = _SAVED_BYTES * n_parameters(config, loader.hook.d_model, loader.d_out)
    step = step_bytes(config, loader, kernel_of(config, loader, kernel, spread).name, spread)
    return _Need(state_bytes(config, loader, spread), step + (saved if loader.device.type == "cpu" else 0))


def _together(needs: Sequence[_Need], loader: MixedBatchLoader, n_threads: int) -> int:
    at_once = sum(sorted((need.step for need in needs), reverse=True)[:n_threads])
    widths = loader.hook.d_model + loader.d_out
    rows = 4 * widths * (2 * loader.data.batch_size * (2 + loader.data.read_ahead) + MAX_ROWS)
    return sum(need.state for need in needs) + at_once + rows


def needed_bytes(
    configs: Sequence[RunConfig],
    loader: MixedBatchLoader,
    n_threads: int,
    kernel: str = "auto",
    spread: Spread = ALONE,
) -> int:
    """An estimate for SAEs that train together: their states, the steps that run at once, and the rows.

    `kernel` is what was asked for. Raises UserError if it cannot train one of them.
    """
    return _together([_need(config, loader, kernel, spread) for config in configs], loader, n_threads)


def split(
    configs: Sequence[RunConfig],
    loader: MixedBatchLoader,
    n_threads: int,
    free: int | None,
    kernel: str = "auto",
    spread: Spread = ALONE,
    *,
    at_least: int = 1,
) -> list[list[RunConfig]]:
    """The runs in as few passes as fit into `free` bytes (None: any), of sizes that differ by at most one.

    `at_least` so many passes, some of them empty if there are fewer runs: other ranks need them. Raises UserError if
    one SAE alone does not fit.
    """
    needs = [_need(config, loader, kernel, spread) for config in configs] if free is not None else []
    for n_passes in range(at_least, max(at_least, len(configs)) + 1):
        ends = [len(configs) * i // n_passes for i in range(n_passes + 1)]
        if free is None or all(_together(needs[start:end], loader, n_threads) <= free for start, end in pairwise(ends)):
            return [list(configs[start:end]) for start, end in pairwise(ends)]
    assert free is not None
    needed, i = max((_together([need], loader, n_threads), i) for i, need in enumerate(needs))
    raise UserError(
        f"{configs[i].name} alone needs {gib(needed)} and {gib(free)} are free on "
        f"{loader.device}; lower --d-sae or --batch-size, take another --device, or raise --memory if you know better"
    )


def passes_sentence(passes: Sequence[Sequence[RunConfig]], needed: int, free: int | None) -> str:
    """`24 SAEs need 31 GiB and 20 GiB are free: 2 passes of 12, each reads the cache`."""
    n = sum(map(len, passes))
    start = f"{n} {'SAE needs' if n == 1 else 'SAEs need'} about {gib(needed)}"
    if free is None:
        return start
    if len(passes) == 1:
        return f"{start} and {gib(free)} are free: 1 pass"
    largest = max(map(len, passes))
    sizes = f"{largest}" if largest * len(passes) == n else f"at most {largest}"
    return f"{start} and {gib(free)} are free: {len(passes)} passes of {sizes}, each reads the cache"


def gib(n_bytes: int) -> str:
    """A size as people read it."""
    return f"{n_bytes / _GIB:,.0f} GiB" if n_bytes >= 10 * _GIB else f"{n_bytes / _GIB:.2g} GiB"


def parse_memory(text: str) -> int:
    """`16G`, `500M` -> bytes. Raises UserError for anything else."""
    return parse_bytes(text, "--memory")


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device to plan with; None where nobody can tell what is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = min((size for size in (_available(), _left_in_group()) if size is not None), default=None)
    else:
        return None
    return None if free is None else free * USABLE // 100


def _available() -> int | None:
    """Of the machine: what Linux calls available, elsewhere all there is."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves (cgroup v2); the page cache that it counts as used can go."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
