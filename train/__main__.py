"""`python -m train`: the command line."""

from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from cache_spec.cache import ActivationCache
from cache_spec.command import run_command
from cache_spec.counts import parse_count
from train import options
from train.config import DataConfig, RunConfig
from train.grid import check_target, make_runs, schedule_for
from train.loader import MixedBatchLoader
from train.reading import read_device, read_hook, read_lists
from train.report import keep_freed_memory, print_plan, print_results
from train.sweep import train_sweep

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_ARCH, _D_SAE, _K, _ZERO, _LR, _NONE = ["batchtopk"], ["4096"], ["40"], ["0"], ["3e-4"], ["none"]


@app.command(
    help="Train sparse autoencoders from an activation cache. Lists (with commas, or the option again) make a grid, "
    "and one read of the cache feeds all of it. Each run becomes a SAELens v6 folder."
)
def train(
    cache: options.Cache,
    out: options.Out,
    hook: options.Hook = "",
    arch: options.Arch = _ARCH,
    d_sae: options.DSae = _D_SAE,
    k: options.K = _K,
    masked_fraction: options.MaskedFraction = _ZERO,
    corrupt: options.Corrupt = _NONE,
    match_strength: options.MatchStrength = None,
    penalty: options.Penalty = None,
    seed: options.Seed = _ZERO,
    lr: options.Lr = _LR,
    tokens: options.Tokens = "",
    batch_size: options.BatchSize = 2048,
    masked_variant: options.MaskedVariant = "masked",
    positions: options.Positions = "all",
    target: options.Target = "self",
    force: options.Force = False,
    data_seed: options.DataSeed = 0,
    open_shards: options.OpenShards = 0,
    warmup_steps: options.WarmupSteps = None,
    decay_start: options.DecayStart = None,
    sparsity_warmup_steps: options.SparsityWarmupSteps = None,
    threshold_start: options.ThresholdStart = None,
    threshold_beta: options.ThresholdBeta = None,
    dead_tokens: options.DeadTokens = None,
    kernel: options.KernelName = "auto",
    device: options.Device = "cpu",
    checkpoint_every: options.CheckpointEvery = None,
    resume: options.Resume = False,
    allow_partial: options.AllowPartial = False,
    dry_run: options.DryRun = False,
) -> None:
    lists = read_lists(arch, d_sae, k, masked_fraction, corrupt, penalty or [], seed, lr, match_strength)
    opened = ActivationCache.open(cache, allow_partial=allow_partial)
    data = DataConfig(
        hook=read_hook(opened, hook),
        n_tokens=parse_count(tokens, "--tokens") if tokens else opened.plan.n_train_rows,
        batch_size=batch_size,
        masked_variant=masked_variant,
        positions=positions,
        target=target,
        seed=data_seed,
        open_shards=open_shards,
    )
    loader = MixedBatchLoader(opened, data, with_masked=lists.want_masked, device=read_device(device))
    schedule = schedule_for(
        loader, warmup_steps, decay_start, sparsity_warmup_steps, threshold_start, threshold_beta, dead_tokens
    )
    runs = make_runs(lists, schedule, loader.scale, masked_variant)
    check_target(data, runs, force=force)
    print_plan(loader, runs, _n_threads(device))
    if not dry_run:
        _train(loader, runs, out, kernel, checkpoint_every, resume)


def _train(
    loader: MixedBatchLoader,
    runs: Sequence[RunConfig],
    out: Path,
    kernel: str,
    checkpoint_every: int | None,
    resume: bool,
) -> None:
    keep_freed_memory()
    facts = train_sweep(
        loader,
        runs,
        out=out,
        kernel=kernel,
        checkpoint_every=checkpoint_every or max(500, loader.n_steps // 20),
        resume=resume,
        n_threads=_n_threads(loader.device.type),
    )
    print_results(facts, out)


def _n_threads(device: str) -> int:
    return torch.get_num_threads() if device == "cpu" else 1


if __name__ == "__main__":
    run_command(app)
