"""`python -m evaluate features RUN`: pages to look at what each latent of a run fires on."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Write a site that a browser opens from the disk: an index of a run's latents with search and sort, and a "
    "page for each with its density, histogram, top and quantile examples, clean and masked side by side, nearest "
    "latents, and with --model the tokens that it raises and lowers. Examples are read from the cache; no model is run."
)
def features(
    run: Annotated[Path, typer.Argument(help="One run's folder, that python -m train wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the site: new, empty, or a former site, which it replaces.")],
    latents: Annotated[
        str, typer.Option(help="Which: all, 0-99, 3,7,20-29, or top, dead or random (100 of them; top:50 for 50).")
    ] = "all",
    cache: Annotated[Path | None, typer.Option(help="The cache, if it was moved; default: the run's own.")] = None,
    device: Annotated[str, typer.Option(help="Where the SAE runs: cpu, cuda, cuda:1, mps.")] = "cpu",
    model: Annotated[str, typer.Option(help="The model, for the logit lens; default: none, and no lens.")] = "",
    examples: Annotated[int, typer.Option(help="Top examples of each latent, each from another window.")] = 10,
    tokens: Annotated[
        int, typer.Option(help="Most rows to read: held-out ones first, then training rows.")
    ] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Draws the quantile examples and --latents random.")] = 0,
) -> None:
    # This imports torch and transformers, which take seconds; --help and a mistyped option should not.
    from evaluate.features.command import run_features
    from evaluate.features.gather import Asked

    run_features(
        Asked(
            run=run,
            latents=latents,
            cache=cache,
            device=device,
            model=model,
            examples=examples,
            tokens=tokens,
            seed=seed,
        ),
        out,
    )
