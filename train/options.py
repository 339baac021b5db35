"""The options of `python -m train`, each with the words that --help shows."""

from pathlib import Path
from typing import Annotated

import typer

from train.names import available

_arches, _corruptions, _kernels, _penalties = (
    ", ".join(available(folder)) for folder in ("architectures", "corruptions", "kernels", "penalties")
)

# what to train from
Cache = Annotated[Path, typer.Option(help="The activation cache, a folder that python -m harvest made.")]
Out = Annotated[Path, typer.Option(help="Folder for the runs; each run gets a folder of its own in it.")]
Hook = Annotated[str, typer.Option(help="Hook point, such as layer_12. Default: the cache's, if it holds only one.")]
AllowPartial = Annotated[bool, typer.Option("--allow-partial", help="Train from a cache that misses shards.")]
Tokens = Annotated[
    str, typer.Option(help="Rows to train on, such as 50M; more than there are: several epochs. Default: as many.")
]
BatchSize = Annotated[int, typer.Option(help="Rows in a batch.", min=1)]
MaskedVariant = Annotated[str, typer.Option(help="The cache's variant that masked rows are taken from.")]
Positions = Annotated[
    str, typer.Option(help="Rows to use: all; drop_masked: none whose own token was masked; only_masked: only those.")
]
Target = Annotated[str, typer.Option(help="What to reconstruct: the input itself (self) or the clean row (clean).")]
Force = Annotated[bool, typer.Option("--force", help="Allow --target clean although masked positions are kept.")]
DataSeed = Annotated[int, typer.Option(help="Seed of the rows' order, the same for all runs.")]
OpenShards = Annotated[int, typer.Option(help="Shards read at the same time; 0: as many as it takes to mix.", min=0)]

# the grid: every list may have commas, or the option may come again
Arch = Annotated[list[str], typer.Option(help=f"List of architectures: {_arches}.")]
DSae = Annotated[list[str], typer.Option(help="List of dictionary sizes.")]
K = Annotated[list[str], typer.Option(help="List of active latents a row; for jumprelu the L0 to aim at.")]
MaskedFraction = Annotated[
    list[str], typer.Option(help="List of exact shares of rows from the masked variant, 0 to 1.")
]
Corrupt = Annotated[
    list[str],
    typer.Option(
        help=f"List of controls: {_corruptions}, none. gaussian=0.4 is noise 0.4 times as long as a row; dropout=0.2 "
        "zeroes a fifth of the entries. Without a number, --match-strength sets it."
    ),
]
MatchStrength = Annotated[
    float | None,
    typer.Option(help="Make a corruption move rows as far, in mean square, as this masked fraction does."),
]
Penalty = Annotated[
    list[str] | None,
    typer.Option(help=f"Coefficients, such as l1=0.02, of {_penalties}; several of one name are a list."),
]
Seed = Annotated[list[str], typer.Option(help="List of seeds for the weights.")]
Lr = Annotated[list[str], typer.Option(help="List of learning rates.")]

# the schedule: defaults follow the steps there are
WarmupSteps = Annotated[int | None, typer.Option(help="Learning rate warm-up. Default: 1000, or 5 % of a short run.")]
DecayStart = Annotated[int | None, typer.Option(help="Step where the learning rate starts to fall. Default: at 80 %.")]
SparsityWarmupSteps = Annotated[
    int | None, typer.Option(help="Warm-up of l1 and l0. Default: 5000, or 25 % of a short run.")
]
ThresholdStart = Annotated[
    int | None, typer.Option(help="Step after which BatchTopK's threshold is averaged. Default: as the warm-up.")
]
ThresholdBeta = Annotated[
    float | None, typer.Option(help="What that average keeps each step. Default: 1 - 1 / the warm-up's default.")
]
DeadTokens = Annotated[
    int | None, typer.Option(help="A latent silent for so many tokens is dead. Default: 10M, or 10 % of a short run.")
]

# how to run
KernelName = Annotated[str, typer.Option(help=f"auto, or one of: {_kernels}.")]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(help="Steps between checkpoints. Default: 5 % of all, at least 500.", min=1)
]
Resume = Annotated[bool, typer.Option("--resume", help="Skip complete runs, go on with unfinished ones.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")]
