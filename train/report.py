"""What the command prints: the plan before it starts, a small table when it is done."""

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.grid import FULL_WINDOW
from train.loader import MixedBatchLoader
from train.scale import recipe_label

_DENSE_COPIES = 4  # [batch, d_sae] float32 tensors that a dense step holds at once


def print_plan(loader: MixedBatchLoader, runs: Sequence[RunConfig], n_threads: int) -> None:
    """The rows, the schedule, the memory, and each run."""
    data, scale = loader.data, loader.scale
    plan = loader.cache.plan
    epochs = loader.n_steps / loader.n_batches
    print(
        f"cache     {loader.cache.path}: {loader.hook.name} of {plan.model.get('id', 'unknown')}, "
        f"{loader.n_rows:,} rows to train on, d_model {loader.hook.d_model}"
    )
    print(
        f"data      {data.n_tokens:,} tokens: {loader.n_steps:,} steps of {data.batch_size:,}, {epochs:.2f} epochs; "
        f"positions {data.positions}, target {data.target}, data seed {data.seed}"
    )
    moved = "" if scale.displacement is None else f"; a masked row moves by {scale.displacement:.1%} of that, in square"
    print(f"scale     rows are {scale.norm_factor:.4g} long (root mean square){moved}")
    _print_schedule(runs[0], loader.n_steps)
    print(f"memory    about {memory_bytes(loader, runs, n_threads) / 2**20:,.0f} MiB on {loader.device}")
    print(f"runs      {len(runs)}")
    width = max(len(run.name) for run in runs)
    for run in runs:
        print(f"  {run.name:<{width}}  {n_parameters(loader, run):>12,} parameters  {recipe_label(run, data)}")
    sys.stdout.flush()  # before the progress, which goes another way


def _print_schedule(run: RunConfig, n_steps: int) -> None:
    short = f" (defaults scaled to a run below {20 * FULL_WINDOW:,} steps)" if n_steps < 20 * FULL_WINDOW else ""
    print(
        f"schedule  warm-up {run.warmup_steps}, sparsity warm-up {run.sparsity_warmup_steps}, decay from "
        f"{run.decay_start:,}, threshold from {run.threshold_start} with beta {run.threshold_beta:.4g}, dead after "
        f"{run.dead_tokens:,} tokens{short}"
    )


def n_parameters(loader: MixedBatchLoader, run: RunConfig) -> int:
    """Of one SAE, without a trained threshold."""
    d_model = loader.hook.d_model
    return 2 * d_model * run.d_sae + d_model + run.d_sae


def memory_bytes(loader: MixedBatchLoader, runs: Sequence[RunConfig], n_threads: int) -> int:
    """An estimate: weights, gradients and two moments of every run, and the tensors of the steps that run at once."""
    weights = sum(16 * n_parameters(loader, run) for run in runs)
    steps = 4 * _DENSE_COPIES * loader.data.batch_size * max(run.d_sae for run in runs) * min(len(runs), n_threads)
    return weights + steps + 3 * 4 * loader.data.batch_size * loader.hook.d_model


def print_results(facts: Sequence[dict[str, Any]], out: Path) -> None:
    """One line a run: L0 and explained variance on clean held-out rows, latents that died."""
    width = max(len(fact["name"]) for fact in facts)
    print(f"\n{'run':<{width}}  {'L0':>7}  {'explained':>9}  {'dead':>6}  folder")
    for fact in facts:
        seen = fact.get("held_out") or {}
        l0, explained = seen.get("l0"), seen.get("explained_variance")
        print(
            f"{fact['name']:<{width}}  {'-' if l0 is None else f'{l0:.2f}':>7}  "
            f"{'-' if explained is None else f'{explained:.4f}':>9}  {seen.get('n_dead', '-'):>6}  {out / fact['name']}"
        )


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors; else it goes back to the system and returns page by page.

    Worth a tenth of the time of a small step. Elsewhere than on Linux with glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    try:
        set_option = library.mallopt
    except AttributeError:  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3
    set_option(mmap_threshold, 32 << 20)
    set_option(trim_threshold, 1 << 30)
