"""The options of `python -m train`, in groups, each with the words that --help shows. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.copies import DEFAULT_BYTES
from train.names import available

_arches, _corruptions, _kernels, _penalties = (
    ", ".join(available(folder)) for folder in ("architectures", "corruptions", "kernels", "penalties")
)
_GRID = "(grid)"  # these options take lists, with commas or given again; every combination is a run


def _option(*names: str, help: str, min: int | None = None, parser: Callable[[str], Path] | None = None) -> object:
    return typer.Option(*names, help=help, min=min, parser=parser)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says. None and "" are "not given"."""

    cache: Annotated[
        str,
        _option(
            help="(data) The activation cache that python -m harvest made: a folder, or s3://, gs:// or az:// URL."
        ),
    ]
    out: Annotated[
        Path, _option(parser=path, help="(data) Folder for the runs; each run gets a folder of its own in it.")
    ]
    preset: Annotated[
        str, _option(help="Set many options at once: paper, the published set-up. What you give beside it wins.")
    ] = ""

    # the data, one choice for all runs
    hook: Annotated[
        str, _option(help="(data) Hook point, such as layer_12. Default: the cache's, if it holds only one.")
    ] = ""
    target_hook: Annotated[
        str, _option(help="(data) Train transcoders: reconstruct this hook point of the same rows from --hook.")
    ] = ""
    tokens: Annotated[
        str,
        _option(help="(data) Rows to train on, such as 50M; more than there are: several epochs. Default: as many."),
    ] = ""
    batch_size: Annotated[int, _option(help="(data) Rows in a batch.", min=1)] = 2048
    masked_variant: Annotated[str, _option(help="(data) The cache's variant that masked rows are taken from.")] = (
        "masked"
    )
    positions: Annotated[
        str,
        _option(help="(data) Rows to use: all; drop_masked: none whose own token was masked; only_masked: only those."),
    ] = "all"
    target: Annotated[
        str, _option(help="(data) What to reconstruct: the input itself (self) or the clean row (clean).")
    ] = "self"
    force: Annotated[
        bool, _option("--force", help="(data) Allow --target clean although masked positions are kept.")
    ] = False
    data_seed: Annotated[int, _option(help="(data) Seed of the rows' order, the same for all runs.")] = 0
    open_shards: Annotated[
        int,
        _option(
            help="(data) Shards read at the same time; it changes the rows' order. 0: as many as it takes to mix.",
            min=0,
        ),
    ] = 0
    allow_partial: Annotated[bool, _option("--allow-partial", help="(data) Train from a cache that misses shards.")] = (
        False
    )

    # the grid: every list may have commas, or the option may come again
    arch: Annotated[list[str], _option(help=f"{_GRID} Architectures: {_arches}.")] = field(
        default_factory=lambda: ["batchtopk"]
    )
    d_sae: Annotated[list[str], _option(help=f"{_GRID} Dictionary sizes.")] = field(default_factory=lambda: ["4096"])
    k: Annotated[list[str], _option(help=f"{_GRID} Active latents a row; for jumprelu the L0 to aim at.")] = field(
        default_factory=lambda: ["40"]
    )
    masked_fraction: Annotated[
        list[str], _option(help=f"{_GRID} Exact shares of rows from the masked variant, 0 to 1.")
    ] = field(default_factory=lambda: ["0"])
    penalty: Annotated[
        list[str],
        _option(
            help=f"{_GRID} Coefficients, such as l1=0.02, of {_penalties}; several of one name are a list, different "
            "names go together."
        ),
    ] = field(default_factory=list)
    lr: Annotated[list[str], _option(help=f"{_GRID} Learning rates.")] = field(default_factory=lambda: ["3e-4"])
    seed: Annotated[
        list[str], _option(help=f"{_GRID} Seeds of the weights, of a corruption's noise and of resampling.")
    ] = field(default_factory=lambda: ["0"])
    corrupt: Annotated[
        list[str],
        _option(
            help=f"{_GRID} Controls: {_corruptions}, none. gaussian=0.4 is noise 0.4 times as long as a row; "
            "dropout=0.2 zeroes a fifth of the entries. Without a number, --match-strength sets it."
        ),
    ] = field(default_factory=lambda: ["none"])
    consistency: Annotated[
        list[str],
        _option(help=f"{_GRID} Weights of the squared distance between the codes of a row's clean and masked view."),
    ] = field(default_factory=lambda: ["0"])
    match_strength: Annotated[
        float | None,
        _option(help="(training) Make a corruption move rows as far, in mean square, as this masked fraction does."),
    ] = None
    masked_schedule: Annotated[
        str, _option(help="(training) constant, or linear=N: the masked fraction rises from 0 over N steps.")
    ] = "constant"
    skip: Annotated[
        bool,
        _option("--skip", help="(training) Give transcoders a linear path beside the latents, with --target-hook."),
    ] = False

    # how an SAE learns: where nothing is given, as the architecture and the number of steps have it
    warmup_steps: Annotated[
        int | None, _option(help="(training) Learning rate warm-up. Default: 1000, or 5 % of a short run.")
    ] = None
    decay_start: Annotated[
        int | None, _option(help="(training) Step where the learning rate starts to fall. Default: at 80 %.")
    ] = None
    sparsity_warmup_steps: Annotated[
        int | None, _option(help="(training) Warm-up of l1, l0 and the like. Default: 5000, or 25 % of a short run.")
    ] = None
    anneal_start: Annotated[
        int | None,
        _option(help="(training) Step where p_anneal starts to lower p. Default: 10000, or half a short run."),
    ] = None
    p_end: Annotated[
        float | None, _option(help="(training) p_anneal lowers p from 1 to this. Default: the architecture's.")
    ] = None
    p_updates: Annotated[int, _option(help="(training) In so many moves p gets there.", min=2)] = 10
    p_queue: Annotated[
        int, _option(help="(training) Steps before a move of p that decide how its coefficient is rescaled.", min=1)
    ] = 10
    threshold_start: Annotated[
        int | None,
        _option(help="(training) Step after which BatchTopK's threshold is averaged. Default: as the warm-up."),
    ] = None
    threshold_beta: Annotated[
        float | None,
        _option(help="(training) What that average keeps each step. Default: 1 - 1 / the warm-up's default."),
    ] = None
    calibrate: Annotated[
        bool,
        _option(
            "--calibrate/--no-calibrate",
            help="(training) In the end set that threshold so that L0 on clean rows is k, or keep the average.",
        ),
    ] = True
    dead_tokens: Annotated[
        int | None,
        _option(help="(training) A latent silent for so many tokens is dead. Default: 10M, or 10 % of a short run."),
    ] = None
    aux_k: Annotated[int, _option(help="(training) Dead latents that auxk uses a row; 0: half of d_model.", min=0)] = 0
    resample_every: Annotated[
        int, _option(help="(training) Steps between resampling dead latents of dense architectures; 0: never.", min=0)
    ] = 0
    clip_norm: Annotated[
        float | None,
        _option(help="(training) Shorten gradients longer than this; 0: never. Default: the architecture's."),
    ] = None
    beta1: Annotated[
        float | None, _option(help="(training) What Adam's first moment keeps. Default: the architecture's.")
    ] = None
    decoder: Annotated[
        str, _option(help="(training) Decoder rows: unit length, or free. Default: the architecture's.")
    ] = ""
    init_b_dec: Annotated[
        str,
        _option(
            help="(training) b_dec starts at zero, or the median or mean of the first batch. Default: the "
            "architecture's."
        ),
    ] = ""
    bandwidth: Annotated[
        float, _option(help="(training) Width of the window in which a jumprelu threshold learns.")
    ] = 0.001
    precision: Annotated[
        str, _option(help="(training) Of matrix products: fp32 or bf16; weights and losses are float32 in both.")
    ] = "fp32"

    # the machine
    device: Annotated[str, _option(help="(machine) Where to train: cpu, cuda, cuda:1, mps.")] = "cpu"
    parallel: Annotated[
        str,
        _option(
            help="(machine) With torchrun, what the processes share: sweep, each trains some of the runs; data, each "
            "takes its rows of every batch; latents, each holds its part of the SAE. Default: sweep; a process alone "
            "trains everything. docs/cluster.md has the commands."
        ),
    ] = ""
    kernel: Annotated[
        str, _option(help=f"(machine) How steps are computed: {_kernels}, or auto, the fastest for the shape.")
    ] = "auto"
    memory: Annotated[
        str,
        _option(
            help="(machine) Memory to plan with, such as 16G; what does not fit is trained in several passes over "
            "the cache. Default: what is free on the device."
        ),
    ] = ""
    io: Annotated[str, _option(help="(machine) How to read the cache: mmap, pread, or auto by its size and place.")] = (
        "auto"
    )
    cache_dir: Annotated[
        str | None,
        _option(
            help="(machine) Folder for copies of a cache at a URL; may be shared. Default: among the user's caches."
        ),
    ] = None
    cache_bytes: Annotated[
        str, _option(help=f"(machine) Size of all copies in that folder, such as 200GB. Default: {DEFAULT_BYTES}.")
    ] = ""
    readers: Annotated[int, _option(help="(machine) Threads that read ahead.", min=1)] = 2
    read_ahead: Annotated[int, _option(help="(machine) Batches read in advance.", min=1)] = 4

    # watching and going on
    resume: Annotated[bool, _option("--resume", help="(run) Skip complete runs, go on with unfinished ones.")] = False
    checkpoint_every: Annotated[
        int | None, _option(help="(run) Steps between checkpoints. Default: 5 % of all, at least 500.", min=1)
    ] = None
    track: Annotated[
        str, _option(help="(run) Also log to wandb, trackio or tensorboard; log.jsonl is written always.")
    ] = ""
    profile: Annotated[
        bool,
        _option(
            "--profile",
            help="(run) Profile a few steps: print where their time goes, write the trace into OUT/profile, go on.",
        ),
    ] = False
    dry_run: Annotated[bool, _option("--dry-run", help="(run) Print what would be trained, and stop.")] = False
    json: Annotated[
        bool, _option("--json", help="(run) With --dry-run: print it as one JSON object; docs/shell.md has its keys.")
    ] = False
