"""`python -m evaluate RUNS`: the command line."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python still imports ends it without a traceback

import sys
from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import app_for, examples, run_command
from cache_spec.copies import copies_for
from evaluate.commands._options import CacheBytes, CacheDir
from evaluate.names import available
from evaluate.text_sources import TextSources

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


_HELP = (
    "Measure every finished run in a folder, and SAEs of others, on clean held-out text at a matched L0, with "
    "controls, and compare recipes seed by seed. Writes report.json beside each run, and report.json and report.html "
    "over all. What was measured before by the same code is not measured again."
)
_EXAMPLES = (
    "python -m evaluate runs",
    "python -m evaluate runs --metrics core,probing --probe-data sentiment.jsonl",
    "python -m evaluate --sae owner/name:subfolder --cache caches/tiny.zarr \\\n"
    "    --metrics core,robustness --out evaluation",
)


def evaluate(
    runs: Annotated[
        Path | None, typer.Argument(parser=path, help="The folder that python -m train wrote with --out, or one run.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help=f"Comma separated: {', '.join(available())}. Default: all of them.")
    ] = "",
    sae: Annotated[
        list[str] | None,
        typer.Option(help="An SAE of SAELens, dictionary_learning or sparsify: a folder or owner/name[:subfolder]."),
    ] = None,
    cache: Annotated[
        str, typer.Option(help="The cache to measure on, if it was moved or for --sae; default: the runs' own.")
    ] = "",
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = "",
    hook: Annotated[str, typer.Option(help="The cache's hook point for --sae; default: what its cfg.json says.")] = "",
    probe_data: Annotated[
        list[Path] | None,
        typer.Option(parser=path, help="Labelled text to probe on: a jsonl or csv file or a folder; repeatable."),
    ] = None,
    sae_probes: Annotated[
        bool, typer.Option(help="Also probe on the out-of-distribution sets of the installed sae-probes package.")
    ] = False,
    shifted_text: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Text of another distribution, to reconstruct: a txt, jsonl or csv file or a folder."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where SAEs and model run: cpu, cuda, cuda:1, mps.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder for the report over all runs; default: RUNS, else evaluation."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the generated test text and which rows are sampled.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
) -> None:
    # This imports torch and transformers, which take seconds; --help and a mistyped option should not.
    from evaluate.command import run

    run(
        runs,
        metrics=metrics,
        saes=sae or (),
        cache=cache or None,
        copies=copies_for(cache or None, cache_dir, cache_bytes),
        hook=hook,
        sources=TextSources(probe_data=tuple(probe_data or ()), sae_probes=sae_probes, shifted_text=shifted_text),
        device=device,
        out=out or runs or Path("evaluation"),
        seed=seed,
        fresh=fresh,
    )


OTHERS: dict[str, str] = {
    "features": "evaluate.commands.features",
    "neuronpedia": "evaluate.commands.neuronpedia",
    "saebench": "evaluate.commands.saebench",
}
"""Commands beside measuring, by their first word, and the modules of their apps."""

app.command(help=_HELP, epilog=examples(*_EXAMPLES, others=OTHERS))(evaluate)

if __name__ == "__main__":
    run_command(app_for(sys.argv, app, OTHERS))
