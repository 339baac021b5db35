"""`python -m evaluate RUNS`: the command line."""

from pathlib import Path
from typing import Annotated

import typer

from cache_spec.command import run_command
from evaluate.names import available

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Measure every finished run in a folder on clean held-out text at a matched L0, with controls, and compare "
    "recipes seed by seed. Writes report.json beside each run, and report.json and report.html over all."
)
def evaluate(
    runs: Annotated[Path, typer.Argument(help="The folder that python -m train wrote with --out, or one run.")],
    metrics: Annotated[
        str, typer.Option(help=f"Comma separated: {', '.join(available())}. Default: all of them.")
    ] = "",
    cache: Annotated[
        Path | None, typer.Option(help="Where the runs' cache is now, if it was moved; default: where run.json says.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where SAEs and model run: cpu, cuda, cuda:1, mps.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for the report over all runs; default: RUNS.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the generated test text and which rows are sampled.")] = 0,
) -> None:
    # This imports torch and transformers, which take seconds; --help and a mistyped option should not.
    from evaluate.command import run

    run(runs, metrics=metrics, cache=cache, device=device, out=out or runs, seed=seed)


if __name__ == "__main__":
    run_command(app)
