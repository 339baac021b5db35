"""`python -m harvest`: the command line."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python still imports ends it without a traceback

import os
from typing import TYPE_CHECKING

import typer

from cache_spec.command import examples, heed, run_command
from harvest import options
from harvest.claims import TIMEOUT, check_timeout
from harvest.share import local_device, read_share

if TYPE_CHECKING:
    from harvest.model import LoadedModel
    from harvest.request import Request

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Run a model over text, clean and masked, and write its activations to a cache on the disk. "
    "The same command again goes on where it stopped.",
    epilog=examples(
        "python -m harvest --model tiny --tokens 200k --out caches/tiny.zarr",
        "python -m harvest --model pythia-160m --dataset pile-cc --layers 8 \\\n"
        "    --tokens 2M --out caches/pythia-160m.zarr --dry-run",
        "python -m harvest --model path/to/model --dataset path/to/text.jsonl \\\n"
        "    --layers 12,mlp_out.12 --tokens 10M --device cuda --out caches/mine.zarr",
    ),
)
def harvest(
    model: options.Model,
    out: options.Out,
    dataset: options.Dataset = "",
    layers: options.Layers = "",
    tokens: options.Tokens = "1M",
    mask_prob: options.MaskProb = "0.3",
    mask_string: options.MaskString = "...",
    mask_unit: options.MaskUnit = "token",
    random_prob: options.RandomProb = "0",
    context: options.Context = 0,
    held_out: options.HeldOut = 0.05,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    compile: options.Compile = False,
    batch_windows: options.BatchWindows = 0,
    scale_factor: options.ScaleFactor = "0",
    shard: options.Shard = "",
    claim_timeout: options.ClaimTimeout = TIMEOUT,
    scratch: options.Scratch = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    _prepare()
    asked = options.Options(
        dataset=dataset,
        layers=layers,
        tokens=tokens,
        mask_prob=mask_prob,
        mask_string=mask_string,
        mask_unit=mask_unit,
        random_prob=random_prob,
        context=context,
        held_out=held_out,
        scale_factor=scale_factor,
        seed=seed,
    )
    options.check_options(asked)
    options.check_json(as_json, dry_run)
    check_timeout(claim_timeout)
    share = read_share(shard, os.environ)
    # torch and transformers take seconds to import; --help and a mistyped option should not.
    from harvest import run

    loaded, request = _load(model, local_device(device, os.environ), dtype, attention, asked)
    run.harvest(
        loaded,
        request,
        out,
        scratch=scratch,
        share=share,
        batch_windows=batch_windows,
        compile=compile,
        dry_run=dry_run,
        as_json=as_json,
        claim_timeout=claim_timeout,
    )


def _load(
    model: str, device: str, dtype: str, attention: str, asked: options.Options
) -> tuple["LoadedModel", "Request"]:
    """The model as far as it is needed, and what is asked of it."""
    from harvest.model import load_model
    from harvest.reader import release_rest
    from harvest.request import make_request

    # The weights wait on the host until those after the last wanted layer are dropped.
    loaded = load_model(model, device=device, dtype=dtype, attention=attention, wait=True)
    request = make_request(loaded, model, asked)
    return release_rest(loaded, request.hook_points), request


def _prepare() -> None:
    """Heed signals from now on, and set what torch has to find when it is first imported."""
    heed(signal.SIGINT, signal.SIGTERM)
    # Waiting threads sleep. By default they spin, and beside other work on the same cores that made a harvest five
    # times slower. OpenMP reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    run_command(app)
