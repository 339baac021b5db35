"""`python -m train import DIR [--out DIR]`: an SAE of another tool, checked and written as a SAELens folder."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import examples

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    name="import",
    help="Read an SAE that SAELens, dictionary_learning or sparsify wrote, say what it is, and with --out write a "
    "SAELens folder with all of its scaling folded in: raw activations in, decoder rows of length 1 but for a top-k. "
    "`python -m evaluate --sae` takes either folder. No code in the folder is run.",
    epilog=examples(
        "python -m train import downloads/ae",
        "python -m train import downloads/ae --out imported/ae",
    ),
)
def import_(
    folder: Annotated[Path, typer.Argument(parser=path, help="The folder of one SAE.")],
    out: Annotated[
        Path | None, typer.Option(parser=path, help="A new folder to write it to. Default: only say what it is.")
    ] = None,
) -> None:
    # This imports torch, which takes seconds; --help and a mistyped option should not.
    from safetensors.torch import save

    from cache_spec.files import readable_json
    from cache_spec.untrusted import printable
    from train.exported import write_folder
    from train.foreign import format_of, read_folder
    from train.run_folder import CFG, WEIGHTS
    from train.saelens import config_with

    stored = read_folder(folder)
    cfg = config_with(stored.sae, stored.metadata)
    what = f"{cfg['architecture']}, {stored.sae.d_model} -> {stored.sae.d_sae} latents"
    where = stored.metadata.get("hook_name") or "a hook point that it does not name"
    print(printable(f"{folder}: {format_of(folder).__name__.rpartition('.')[2]}, {what}, reads {where}"))
    for note in stored.notes:
        print(printable(f"note: {note}"))
    if out is not None:
        write_folder(out, {CFG: readable_json(cfg), WEIGHTS: save(stored.tensors)})
    if not stored.is_transcoder:
        print(f"to measure it beside runs: python -m evaluate RUNS --sae {shlex.quote(str(out or folder))}")
