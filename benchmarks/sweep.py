"""What an SAE costs in a sweep: 1, 2, 4 and 8 SAEs of one shape trained together from one read of a cache.

    python -m benchmarks.sweep [--shape 512,4096,32,2048] [--saes 1,2,4,8] [--kernel auto]

The sizes are timed in turn, a few steps each, with the loop and the threads of `python -m train`. `x one` is the time
of a step of all N over N times a step of one alone, round by round: 1 is no gain and no loss, below 1 what they share
pays. `waits` is the share of the time in which every SAE was done and the next rows were not there.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.contest import spread
from benchmarks.jobs import describe, machine, make_job
from benchmarks.loader import make_cache
from benchmarks.peers.job import Job
from cache_spec.cache import ActivationCache
from cache_spec.command import run_command
from cache_spec.errors import UserError
from train.choosing import kernels_for
from train.config import DataConfig, RunConfig
from train.loader import MixedBatchLoader
from train.mixing import CLEAN, Rows
from train.passes import threads_of
from train.report import keep_freed_memory
from train.step import TrainRun
from train.timetable import schedule_for
from train.workers import workers

N_SHARDS = 8  # of the made-up cache
LONG = 1_000_000  # steps that the schedule is laid out for; the benchmark stops long before
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Stretch:
    """What a few steps took."""

    seconds: float
    """Of a step."""
    waiting: float
    """Seconds of it in which the rows were late."""


def open_loader(cache: ActivationCache, job: Job) -> MixedBatchLoader:
    """Clean rows of the made-up cache, over and over."""
    data = DataConfig(hook=cache.plan.hooks[0].name, n_tokens=LONG * job.batch, batch_size=job.batch)
    return MixedBatchLoader(cache, data, with_masked=False, device=job.device)


def new_runs(loader: MixedBatchLoader, job: Job, kernel: str, n: int) -> list[TrainRun]:
    """SAEs that differ in their seeds."""
    schedule = vars(schedule_for(loader))
    configs = [
        RunConfig(name=f"sae {i}", arch=job.arch, d_sae=job.d_sae, k=job.k, seed=i, precision=job.precision, **schedule)
        for i in range(n)
    ]
    start = loader.read(0, with_masked=False).clean
    runs: list[TrainRun] = []
    for config, chosen in zip(configs, kernels_for(loader, configs, kernel), strict=True):
        run = TrainRun(config, loader.hook.d_model, loader.n_steps, chosen, device=str(loader.device))
        run.start_at(start)
        runs.append(run)
    return runs


def train(loader: MixedBatchLoader, runs: Sequence[TrainRun], n_steps: int) -> Stretch:
    """Steps of all runs on the same rows, read ahead, as a sweep does them; the first step is not counted."""
    done: list[float] = []
    waiting, first = 0.0, runs[0].n_done
    n_threads = torch.get_num_threads() if loader.device.type == "cpu" else 1
    todo = [(run, threads_of(run.config, loader, n_threads)) for run in runs]

    def step(run: TrainRun, x: torch.Tensor) -> None:
        run.step(x, x)
        done.append(time.perf_counter())

    with loader.stream(first, first + n_steps + 1, CLEAN) as stream, workers(n_threads) as pool:
        read: Callable[[], tuple[Rows | None, float]] = lambda: (next(stream, None), time.perf_counter())  # noqa: E731
        rows, _ = read()
        start = time.perf_counter()
        for i in range(n_steps + 1):
            assert rows is not None
            x = rows.mix(0.0, loader.data.target).x
            done.clear()
            rows, there = pool.run(lambda run, x=x: step(run, x), todo, meanwhile=read)
            if i == 0:
                wait_for(loader.device)
                start = time.perf_counter()
            else:
                waiting += max(0.0, there - max(done))
        wait_for(loader.device)
    return Stretch((time.perf_counter() - start) / n_steps, waiting / n_steps)


def wait_for(device: torch.device) -> None:
    """A GPU works on while Python goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_sizes(text: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4]; 1 is always there. Raises UserError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--saes is '{text}'; give numbers of SAEs with commas, such as 1,2,4,8")
    return sorted({1, *map(int, parts)})


@app.command()
def main(
    shape: Annotated[str, typer.Option(help="d_model,d_sae,k,batch")] = "512,4096,32,2048",
    saes: Annotated[str, typer.Option(help="how many SAEs, with commas")] = "1,2,4,8",
    arch: Annotated[str, typer.Option(help="architecture")] = "batchtopk",
    kernel: Annotated[str, typer.Option(help="as for python -m train")] = "auto",
    precision: Annotated[str, typer.Option(help="as for python -m train")] = "fp32",
    rounds: Annotated[int, typer.Option(help="times that each is measured, after one for warming up", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="steps in a round", min=1)] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    shard_rows: Annotated[int, typer.Option(help="rows in each of the cache's 8 shards", min=1024)] = 8192,
) -> None:
    """Make a cache in a temporary folder, train the SAEs and print the table."""
    keep_freed_memory()  # as training does
    job = make_job(arch, shape, precision, device)
    times: dict[int, list[Stretch]] = {n: [] for n in parse_sizes(saes)}
    with tempfile.TemporaryDirectory() as folder:
        loader = open_loader(make_cache(Path(folder) / "cache", job.d_model, shard_rows, N_SHARDS), job)
        groups = {n: new_runs(loader, job, kernel, n) for n in times}
        for i in range(rounds + 1):
            for n, runs in groups.items():
                stretch = train(loader, runs, steps)
                if i:  # the first warms up
                    times[n].append(stretch)
    print(f"kernel {groups[1][0].kernel.name}, {describe(job)}")
    print(f"{'SAEs':>4}{'ms a step':>12}{'ms a SAE step':>15}{'x one':>8}{'quartiles':>14}{'waits':>8}")
    for n, measured in times.items():
        whole = spread([1e3 * stretch.seconds for stretch in measured]).middle
        shared = spread([a.seconds / (n * b.seconds) for a, b in zip(measured, times[1], strict=True)])
        waits = sum(stretch.waiting for stretch in measured) / sum(stretch.seconds for stretch in measured)
        quartiles = f"{shared.low:.2f}-{shared.high:.2f}"
        print(f"{n:>4}{whole:>12.1f}{whole / n:>15.1f}{shared.middle:>8.2f}{quartiles:>14}{waits:>8.1%}")
    print(f"machine   {machine(device)}, torch {torch.__version__}")


if __name__ == "__main__":
    run_command(app)
