"""`python -m harvest`: the command line."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cache_spec.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


Model = Annotated[
    str,
    typer.Option(
        help="Short name (tiny, pythia-70m, pythia-160m, gpt2, gemma-2-2b), hub id or local folder; of the families "
        "gemma2, gpt2, gpt_neox, llama and qwen3."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the cache: new, empty, or an unfinished cache to go on with.")]
Dataset = Annotated[
    str,
    typer.Option(
        help="'embedded', a .txt (blank lines between documents), a .jsonl (field 'text'), a folder of them, or a "
        "hub data set (owner/name[:config][@revision]). Default: what suits the model's short name."
    ),
]
Layers = Annotated[
    str,
    typer.Option(
        help="Hook points, comma separated: 8 or resid_post.8 (after layer 8, the first is 0), resid_pre.8, "
        "attn_out.8, mlp_out.8. Default: the short name's layer."
    ),
]
Tokens = Annotated[
    str,
    typer.Option(help="Rows of each variant, train and held out together: 500k, 1M, ...; rounded down."),
]
MaskProb = Annotated[
    float,
    typer.Option(help="Chance that a token is replaced in the masked variant; 0 leaves that variant out."),
]
MaskString = Annotated[str, typer.Option(help="What replaces a token; must be one token for the model's tokenizer.")]
RandomProb = Annotated[
    float,
    typer.Option(help="Chance that a token becomes a random one in a variant 'random'; 0 leaves it out."),
]
Context = Annotated[
    int,
    typer.Option(help="Tokens of a window, which the model sees at once; 0: 1024 or what the model allows."),
]
HeldOut = Annotated[float, typer.Option(help="Share of the rows that comes from documents kept from training.")]
Seed = Annotated[int, typer.Option(help="Decides masks, order, held-out documents and the embedded text.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[
    str,
    typer.Option(help="Of the model: float32, bfloat16, float16; auto keeps bfloat16, else takes float32."),
]
BatchWindows = Annotated[
    int,
    typer.Option(help="Windows run at once, each in all variants; 0 chooses. Changes speed, memory and rounding only."),
]
ScaleFactor = Annotated[
    float,
    typer.Option(help="Activations are stored divided by this power of two; 0: found by a short pilot run."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the disk space; write nothing.")]


@app.command(
    help="Run a model over text, clean and masked, and write its activations to a cache on the disk. "
    "The same command again goes on where it stopped."
)
def harvest(
    model: Model,
    out: Out,
    dataset: Dataset = "",
    layers: Layers = "",
    tokens: Tokens = "1M",
    mask_prob: MaskProb = 0.3,
    mask_string: MaskString = "...",
    random_prob: RandomProb = 0.0,
    context: Context = 0,
    held_out: HeldOut = 0.05,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    batch_windows: BatchWindows = 0,
    scale_factor: ScaleFactor = 0.0,
    dry_run: DryRun = False,
) -> None:
    # Waiting threads sleep. By default they spin, and beside other work on the same cores that made a harvest five
    # times slower. OpenMP reads this once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and transformers take seconds to import; --help and a mistyped option should not.
    from harvest import run
    from harvest.model import load_model
    from harvest.request import make_request

    loaded = load_model(model, device=device, dtype=dtype, weights=not dry_run)
    request = make_request(
        loaded,
        model,
        dataset=dataset,
        layers=layers,
        tokens=tokens,
        mask_prob=mask_prob,
        mask_string=mask_string,
        random_prob=random_prob,
        context=context,
        held_out=held_out,
        scale_factor=scale_factor,
        seed=seed,
    )
    run.harvest(loaded, request, out, batch_windows=batch_windows, dry_run=dry_run)


if __name__ == "__main__":
    run_command(app)
