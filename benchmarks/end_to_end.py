"""From a cache to trained SAEs: what `python -m train` makes of the step.

    python -m benchmarks.end_to_end [--shape 512,8192,32,2048] [--kernel dense,sparse] [--saes 1] [--steps 60]

For each kernel: tokens/s of the step alone on rows that lie in memory, of the loop that reads them from the cache, and
of the whole command, from its start to the folders that it leaves (imports, held-out rows, the log, calibration and
the files are in it, so a short job looks worse than a long one). `x step` is each over the step alone; `waits` is the
share of the loop's time in which the SAEs were done and the next rows were not there.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.contest import spread
from benchmarks.jobs import describe, machine, make_job, parse_kernels
from benchmarks.loader import make_cache
from benchmarks.peers.job import Job
from benchmarks.sweep import N_SHARDS, Stretch, new_runs, open_loader, train, wait_for
from cache_spec.command import run_command
from cache_spec.errors import UserError
from train.loader import MixedBatchLoader
from train.passes import threads_of
from train.report import keep_freed_memory
from train.step import TrainRun

ROOT = Path(__file__).parent.parent
N_RESIDENT = 4  # batches in memory for the step alone
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def alone(loader: MixedBatchLoader, runs: Sequence[TrainRun], n_steps: int) -> float:
    """Seconds of a step of all runs one after another, on rows that are there already and with the loop's threads."""
    batches = [loader.read(i, with_masked=False).clean for i in range(N_RESIDENT)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of(runs[0].config, loader, before))
    wait_for(loader.device)
    start = time.perf_counter()
    for i in range(n_steps):
        for run in runs:
            run.step(batches[i % N_RESIDENT], batches[i % N_RESIDENT])
    wait_for(loader.device)
    seconds = (time.perf_counter() - start) / n_steps
    torch.set_num_threads(before)
    return seconds


def command_seconds(cache: Path, out: Path, options: list[str]) -> float:
    """Wall clock of the whole command. Raises UserError with its last words if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "train", "--cache", str(cache), "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"python -m train ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - start


@app.command()
def main(
    shape: Annotated[str, typer.Option(help="d_model,d_sae,k,batch")] = "512,8192,32,2048",
    kernel: Annotated[str, typer.Option(help="kernels, with commas; default: all that the device can run")] = "",
    arch: Annotated[str, typer.Option(help="architecture")] = "batchtopk",
    precision: Annotated[str, typer.Option(help="as for python -m train")] = "fp32",
    saes: Annotated[int, typer.Option(help="SAEs that are trained together", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="steps of the whole command", min=20)] = 60,
    rounds: Annotated[int, typer.Option(help="times that step and loop are measured", min=1)] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    shard_rows: Annotated[int, typer.Option(help="rows in each of the cache's 8 shards", min=1024)] = 8192,
) -> None:
    """Make a cache in a temporary folder and print the table."""
    keep_freed_memory()  # as training does
    job = make_job(arch, shape, precision, device)
    print(f"{describe(job)}; {saes} {'SAE' if saes == 1 else 'SAEs'}")
    print(f"{'':<26}{'tokens/s':>12}{'x step':>8}{'waits':>8}")
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder) / "cache", job.d_model, shard_rows, N_SHARDS)
        for name in parse_kernels(kernel, device):
            stages = measure(open_loader(cache, job), job, name, saes, rounds, max(2, steps // (4 * rounds)))
            out = Path(folder) / f"runs_{name}"
            whole = command_seconds(cache.path, out, options_of(job, name, saes, steps)) / steps
            for what, seconds, waits in (*stages, ("whole command", whole, None)):
                text = f"{name}: {what}"
                share = "" if waits is None else f"{waits:>8.1%}"
                print(f"{text:<26}{job.batch / seconds:>12,.0f}{stages[0][1] / seconds:>8.2f}{share}", flush=True)
    print(f"machine   {machine(device)}, torch {torch.__version__}; the command made {steps} steps")


def measure(
    loader: MixedBatchLoader, job: Job, kernel: str, saes: int, rounds: int, n_steps: int
) -> list[tuple[str, float, float | None]]:
    """Seconds of a step alone and of one with the loader, in turn, and the share of waiting."""
    runs = new_runs(loader, job, kernel, saes)
    steps: list[float] = []
    loops: list[Stretch] = []
    for i in range(rounds + 1):
        seconds, loop = alone(loader, runs, n_steps), train(loader, runs, n_steps)
        if i:  # the first warms up
            steps.append(seconds)
            loops.append(loop)
    waits = sum(loop.waiting for loop in loops) / sum(loop.seconds for loop in loops)
    with_loader = spread([loop.seconds for loop in loops]).middle
    return [("step alone", spread(steps).middle, None), ("step and loader", with_loader, waits)]


def options_of(job: Job, kernel: str, saes: int, steps: int) -> list[str]:
    """Of the command that trains them."""
    return [
        *("--arch", job.arch, "--d-sae", str(job.d_sae), "--k", str(job.k), "--batch-size", str(job.batch)),
        *("--tokens", str(steps * job.batch), "--seed", ",".join(map(str, range(saes)))),
        *("--kernel", kernel, "--precision", job.precision, "--device", job.device),
    ]


if __name__ == "__main__":
    run_command(app)
