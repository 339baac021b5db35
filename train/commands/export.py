"""`python -m train export RUN --to FORMAT --out DIR`: a run for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import examples
from train.names import available

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Write a run, or an SAE of any format that `import` reads, for another tool. What the tool loads computes the "
    "same on raw activations, or nothing is written: what it cannot say is refused, and sparsify, which has no "
    "thresholds, needs --approximate for all but topk. A run's folder is a SAELens SAE already; --to saelens copies it "
    "without its log. docs/formats.md has how each tool loads it.",
    epilog=examples(
        "python -m train export runs/batchtopk_d512_k6_seed0 --to dictionary_learning \\\n    --out exported/ae",
        "python -m train export runs/topk_d512_k6_seed0 --to sparsify --out exported/sp",
        "python -m train export runs/batchtopk_d512_k6_seed0 --to sparsify --approximate \\\n    --out exported/close",
    ),
)
def export(
    run: Annotated[
        Path, typer.Argument(parser=path, help="The folder of a finished run, or of an SAE that `import` reads.")
    ],
    to: Annotated[str, typer.Option(help=f"The tool: {', '.join(available('formats'))}.")],
    out: Annotated[
        Path, typer.Option(parser=path, help="A new folder; sparsify's gets one in it, named after the hooked module.")
    ],
    approximate: Annotated[
        bool, typer.Option("--approximate", help="For sparsify: write a top-k that is close to the SAE instead of it.")
    ] = False,
    k: Annotated[
        int | None,
        typer.Option(help="With --approximate: latents a row. Default: as trained, else the measured L0.", min=1),
    ] = None,
) -> None:
    # This imports torch, which takes seconds; --help and a mistyped option should not.
    from cache_spec.errors import UserError
    from cache_spec.untrusted import printable
    from train.exported import write_folder
    from train.foreign import read_folder
    from train.names import find

    tool = find("formats", to)
    if approximate and to != "sparsify":
        raise UserError(f"--approximate is for --to sparsify; {to} holds the SAE as it is, leave it out")
    if k is not None and not approximate:
        raise UserError("--k is for --approximate; leave it out")
    stored = read_folder(run)
    try:
        made = tool.write(stored, approximate=approximate, k=k)
    except UserError as error:
        raise UserError(f"{run} cannot become a folder of {to}: {error}") from None
    target = out / made.subfolder
    write_folder(target, made.files)
    what = f"{made.kind}, {stored.sae.d_model} -> {stored.sae.d_sae} latents"
    print(printable(f"{target}: {', '.join(made.files)} ({what})"))
    for note in (*made.notes, *stored.notes):
        print(printable(f"note: {note}"))
