"""`python -m evaluate neuronpedia RUN`: what Neuronpedia imports, and the bodies of uploads to it."""

from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import examples as shown_examples
from evaluate.commands._options import Cache, CacheBytes, CacheDir, Device, Examples, Latents, Model, Run, Seed, Tokens

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Write a run's latents for Neuronpedia: the export folder that it imports, and in upload/ the bodies for its "
    "upload interface, 128 latents each. Nothing is sent without --upload, which needs your key in the environment "
    "variable NEURONPEDIA_API_KEY, and a source set made by your account.",
    epilog=shown_examples(
        "python -m evaluate neuronpedia runs/topk_d4096_k20_seed0 --out neuronpedia \\\n"
        "    --model pythia-160m --set my-set --creator 'My name'",
        "python -m evaluate neuronpedia runs/topk_d4096_k20_seed0 --out neuronpedia \\\n"
        "    --model pythia-160m --set my-set --creator 'My name' --upload",
    ),
)
def neuronpedia(
    run: Run,
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder to write: new, empty, or a former export, which it replaces.")
    ],
    latents: Latents = "all",
    cache: Cache = "",
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = "",
    device: Device = "cpu",
    model: Model = "",
    examples: Examples = 20,
    tokens: Tokens = "1M",
    before: Annotated[int, typer.Option(help="Tokens of context before the one that the latent fires on.")] = 80,
    after: Annotated[int, typer.Option(help="Tokens of context after it.")] = 40,
    seed: Seed = 0,
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
    from cache_spec.copies import copies_for
    from cache_spec.counts import parse_count
    from evaluate.features.gather import Asked
    from evaluate.neuronpedia.command import run_neuronpedia

    asked = Asked(
        run=run,
        latents=latents,
        cache=cache or None,
        copies=copies_for(cache or None, cache_dir, cache_bytes),
        device=device,
        model=model,
        examples=examples,
        tokens=parse_count(tokens, "--tokens"),
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
