"""`python -m evaluate features RUN`: pages to look at what each latent of a run fires on."""

from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import examples as shown_examples
from evaluate.commands._options import Cache, CacheBytes, CacheDir, Device, Examples, Latents, Model, Run, Seed, Tokens

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Write a site that a browser opens from the disk: an index of a run's latents with search and sort, and a "
    "page for each with its density, histogram, top and quantile examples, clean and masked side by side, nearest "
    "latents, and with --model the tokens that it raises and lowers. Examples are from the cache; no model is run.",
    epilog=shown_examples(
        "python -m evaluate features runs/batchtopk_d512_k6_seed0 --out features \\\n    --model tiny",
        "python -m evaluate features runs/batchtopk_d512_k6_seed0 --out features \\\n    --latents top:200",
    ),
)
def features(
    run: Run,
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder for the site: new, empty, or a former site, which it replaces.")
    ],
    latents: Latents = "all",
    cache: Cache = "",
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = "",
    device: Device = "cpu",
    model: Model = "",
    examples: Examples = 10,
    tokens: Tokens = "1M",
    seed: Seed = 0,
) -> None:
    # This imports torch and transformers, which take seconds; --help and a mistyped option should not.
    from cache_spec.copies import copies_for
    from cache_spec.counts import parse_count
    from evaluate.features.command import run_features
    from evaluate.features.gather import Asked

    run_features(
        Asked(
            run=run,
            latents=latents,
            cache=cache or None,
            copies=copies_for(cache or None, cache_dir, cache_bytes),
            device=device,
            model=model,
            examples=examples,
            tokens=parse_count(tokens, "--tokens"),
            seed=seed,
        ),
        out,
    )
