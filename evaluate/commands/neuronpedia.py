"""`python -m evaluate neuronpedia RUN`: what Neuronpedia imports, and the bodies of uploads to it."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Write a run's latents for Neuronpedia: the export folder that it imports, and in upload/ the bodies for its "
    "upload interface, 128 latents each. Nothing is sent without --upload, which needs your key in the environment "
    "variable NEURONPEDIA_API_KEY, and a source set made by your account."
)
def neuronpedia(
    run: Annotated[Path, typer.Argument(help="One run's folder, that python -m train wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write: new, empty, or a former export, which it replaces.")],
    latents: Annotated[
        str, typer.Option(help="Which: all, 0-99, 3,7,20-29, or top, dead or random (100 of them; top:50 for 50).")
    ] = "all",
    cache: Annotated[Path | None, typer.Option(help="The cache, if it was moved; default: the run's own.")] = None,
    device: Annotated[str, typer.Option(help="Where the SAE runs: cpu, cuda, cuda:1, mps.")] = "cpu",
    model: Annotated[str, typer.Option(help="The model, for the logit lens; default: none, and no lens.")] = "",
    examples: Annotated[int, typer.Option(help="Top examples of each latent, each from another window.")] = 20,
    tokens: Annotated[
        int, typer.Option(help="Most rows to read: held-out ones first, then training rows.")
    ] = 1_000_000,
    before: Annotated[int, typer.Option(help="Tokens of context before the one that the latent fires on.")] = 80,
    after: Annotated[int, typer.Option(help="Tokens of context after it.")] = 40,
    seed: Annotated[int, typer.Option(help="Draws the quantile examples and --latents random.")] = 0,
    model_id: Annotated[str, typer.Option(help="The model's name on Neuronpedia; default: from the cache.")] = "",
    source_set: Annotated[
        str, typer.Option("--set", help="The source set's name there, without the layer; default: the run's name.")
    ] = "",
    creator: Annotated[str, typer.Option(help="Your name, for the release.")] = "",
    creator_id: Annotated[str, typer.Option(help="Your id on the server that imports the folder.")] = "",
    upload: Annotated[bool, typer.Option("--upload", help="Send the bodies; the same command goes on.")] = False,
    url: Annotated[str, typer.Option(help="Where to send them.")] = "https://www.neuronpedia.org",
) -> None:
    # This imports torch and transformers, which take seconds; --help and a mistyped option should not.
    from evaluate.features.gather import Asked
    from evaluate.neuronpedia.command import run_neuronpedia

    asked = Asked(
        run=run,
        latents=latents,
        cache=cache,
        device=device,
        model=model,
        examples=examples,
        tokens=tokens,
        before=before,
        after=after,
        seed=seed,
    )
    run_neuronpedia(
        asked,
        out,
        model_id=model_id,
        source_set=source_set,
        creator=creator,
        creator_id=creator_id,
        sends=upload,
        url=url,
    )
