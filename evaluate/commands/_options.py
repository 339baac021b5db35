"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.copies import DEFAULT_BYTES

Run = Annotated[Path, typer.Argument(parser=path, help="One run's folder, that python -m train wrote.")]
Latents = Annotated[
    str, typer.Option(help="Which: all, 0-99, 3,7,20-29, or top, dead or random (100 of them; top:50 for 50).")
]
Cache = Annotated[str, typer.Option(help="The cache, if it was moved; default: the run's own.")]
CacheDir = Annotated[
    str | None, typer.Option(help="Folder for copies of a cache at a URL; default: among the user's caches.")
]
CacheBytes = Annotated[
    str, typer.Option(help=f"Size of all copies in that folder, such as 200GB; default: {DEFAULT_BYTES}.")
]
Device = Annotated[str, typer.Option(help="Where the SAE runs: cpu, cuda, cuda:1, mps.")]
Model = Annotated[str, typer.Option(help="The model, for the logit lens; default: none, and no lens.")]
Examples = Annotated[int, typer.Option(help="Top examples of each latent, each from another window.")]
Tokens = Annotated[str, typer.Option(help="Most rows to read, such as 200k: held-out ones first, then training rows.")]
Seed = Annotated[int, typer.Option(help="Draws the quantile examples and --latents random.")]
