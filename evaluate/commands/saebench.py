"""`python -m evaluate saebench RUN --out DIR`: a folder to run SAEBench on one SAE."""

from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import examples
from evaluate.saebench.run_saebench import NAMES

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    epilog=examples(
        "python -m evaluate saebench runs/topk_d16384_k40_seed0 --out saebench/topk",
        "python -m evaluate saebench runs/topk_d16384_k40_seed0 --out saebench/other \\\n"
        "    --model-name gpt2 --evals core,sparse_probing",
    )
)
def saebench(
    run: Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[Path, typer.Option(parser=path, help="New folder for the SAE, the recipe and the results.")],
    evals: Annotated[
        str,
        typer.Option(help=f"Comma separated: {', '.join(NAMES)}. Default: core, sparse_probing and absorption."),
    ] = "",
    model_name: Annotated[
        str, typer.Option("--model-name", help="TransformerLens's name of the model, if it is not the one of the hub.")
    ] = "",
) -> None:
    """Prepare a run for SAEBench, which needs an environment of its own: the SAE, a script, pins and commands.

    Says what SAEBench would warn of or refuse. Installs and runs nothing. docs/saebench.md has more.
    """
    # This imports torch, which takes seconds; --help should not.
    from evaluate.saebench.prepare import prepare

    chosen = [name.strip() for name in evals.split(",") if name.strip()]
    prepared = prepare(run, out, evals=chosen, model_name=model_name)
    for warning in prepared.warnings:
        print(f"note: {warning}")
    print(f"{out} is ready for {', '.join(prepared.evals)}; {out / 'README.md'} has the commands")
