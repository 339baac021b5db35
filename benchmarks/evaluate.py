"""Minutes that an evaluation takes for 1 and for 12 SAEs of the embedded model, with all their controls.

python -m benchmarks.evaluate [--runs demo/runs] [--cache demo/cache.zarr] [--rounds 2]

Without --runs the embedded model is harvested and 12 SAEs are trained first: batchtopk and matryoshka, unmasked and
masked, three seeds. Every evaluation starts with nothing kept, so the model runs over the evaluation text each time.
Each round times both, the one and the other first in turn, and the table has their ratio round by round. What one
evaluation has to do whatever the number of SAEs is the text, the model and the dense probes; claimed is that 12 SAEs
cost at most 3 times one.
"""

import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from cache_spec import UserError
from cache_spec.command import run_command
from evaluate.command import run
from evaluate.runs import Run, find_runs

MANY = 12
CLAIM = 3.0
TRAIN = "--arch batchtopk --arch matryoshka --k 6 --d-sae 512 --seed 0,1,2 --masked-fraction 0,0.5 --batch-size 512"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def make_runs(folder: Path, tokens: str) -> Path:
    """Harvest the embedded model and train 12 SAEs on it, as `make demo` does; the folder of the runs."""
    cache, runs = folder / "cache.zarr", folder / "runs"
    harvest = f"--model tiny --tokens {tokens} --mask-prob 0.3 --out {cache}"
    train = f"--out {runs} --cache {cache} --tokens {tokens} --lr 1e-3 {TRAIN}"
    for room, options in (("harvest", harvest), ("train", train)):
        subprocess.run(
            [sys.executable, "-m", room, *options.split()],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
    return runs


def choose(runs: list[Run]) -> list[Run]:
    """12 runs, plain ones first. Raises UserError if there are fewer."""
    if len(runs) < MANY:
        raise UserError(f"there are {len(runs)} finished runs and {MANY} are wanted; leave --runs out to train them")
    return sorted(runs, key=lambda run: (not run.is_plain, run.name))[:MANY]


def minutes(runs: list[Run], cache: Path | None, metrics: str) -> float:
    """Minutes to evaluate copies of these runs in a new folder."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for each in runs:
            shutil.copytree(each.path, Path(folder) / each.path.name, ignore=shutil.ignore_patterns("report.*"))
        start = time.perf_counter()
        run(Path(folder), out=Path(folder), cache=cache, metrics=metrics)
        return (time.perf_counter() - start) / 60


@app.command()
def main(
    runs: Annotated[Path | None, typer.Option(help="Finished runs of the embedded model; default: make them.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Their cache, if it was moved.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 2,
    metrics: Annotated[str, typer.Option(help="As for python -m evaluate; default: all of them.")] = "",
    tokens: Annotated[str, typer.Option(help="Tokens to harvest and to train on, without --runs.")] = "400k",
) -> None:
    """Print minutes for 1 and for 12 SAEs, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = choose(find_runs(runs or make_runs(Path(folder), tokens))[0])
        print(f"{metrics or 'all metrics'}, d_sae {chosen[0].d_sae}, cpu ({torch.get_num_threads()} threads)")
        print(f"{'round':<8}{'1 SAE, min':>12}{f'{MANY} SAEs, min':>14}{'ratio':>8}")
        ratios = []
        for i in range(rounds):
            # Every other round the other way about, so that a machine that slows down favours neither.
            first = minutes(chosen[:1], cache, metrics) if i % 2 == 0 else 0.0
            many = minutes(chosen, cache, metrics)
            one = first or minutes(chosen[:1], cache, metrics)
            ratios.append(many / one)
            print(f"{i + 1:<8}{one:>12.2f}{many:>14.2f}{ratios[-1]:>8.2f}", flush=True)
    median = statistics.median(ratios)
    print(f"{'median':<34}{median:>8.2f}   at most {CLAIM:g} is claimed: {'met' if median <= CLAIM else 'NOT met'}")


@contextlib.contextmanager
def _quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    run_command(app)
