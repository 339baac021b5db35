"""Where the sparse kernel overtakes the dense one: both train on the same rows over a grid of shapes.

    python -m benchmarks.crossover [--arch batchtopk] [--d-model 128,512] [--d-sae 1024,4096] [--density 0.01,0.05]
        [--batch 512,2048] [--threads 1,2]

For each shape the two kernels are timed in turn, a step each. `dense / sparse` is the median of the ratios round by
round, with quartiles: above 1 sparse is the faster one. `auto` is what train/kernels/_cost.py would take there, marked
`!` where the other kernel was faster by more than the quartiles can explain. AuxK has no work in these steps.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated

import torch
import typer

from benchmarks.contest import Spread, spread
from benchmarks.jobs import machine, make_job, parse_names
from benchmarks.peers import granary
from benchmarks.peers.job import Job, made_up_batches
from cache_spec.command import run_command
from cache_spec.errors import UserError
from train import engine
from train.kernels._cost import saving
from train.report import keep_freed_memory
from train.step import recipe_of

KERNELS = ("dense", "sparse")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Duel:
    """A shape, and both kernels' seconds round by round."""

    job: Job
    dense: list[float]
    sparse: list[float]

    @property
    def ratio(self) -> Spread:
        """Dense over sparse."""
        return spread([a / b for a, b in zip(self.dense, self.sparse, strict=True)])

    @property
    def auto(self) -> str:
        """What `--kernel auto` takes."""
        config = granary.config_of(self.job)
        whole = engine.Job(
            recipe=recipe_of(config),
            config=config,
            d_model=self.job.d_model,
            d_out=self.job.d_model,
            batch_size=self.job.batch,
        )
        return "sparse" if saving(whole, self.job.device)[0] else "dense"

    @property
    def is_wrong(self) -> bool:
        """Whether `auto` takes the slower one, by all that the quartiles can tell."""
        return self.ratio.low > 1 if self.auto == "dense" else self.ratio.high < 1


def jobs(
    arches: list[str], widths: list[int], sizes: list[int], densities: list[float], batches: list[int]
) -> Iterator[Job]:
    """The grid; where a density is less than one latent there is no job."""
    for arch, d_model, d_sae, density, batch in product(arches, widths, sizes, densities, batches):
        if k := round(density * d_sae):
            yield make_job(arch, f"{d_model},{d_sae},{k},{batch}", "fp32", "cpu")


def duel(job: Job, rounds: int) -> Duel:
    """Time both kernels, after two steps for warming up."""
    batches = made_up_batches(replace(job, n_batches=1))
    contestants = {name: granary.build(replace(job, variant=name), batches[0]) for name in KERNELS}
    seconds: dict[str, list[float]] = {name: [] for name in KERNELS}
    for i in range(rounds + 2):
        # every other round the other way about, so that none always follows the same neighbour
        for name in KERNELS if i % 2 == 0 else reversed(KERNELS):
            start = time.perf_counter()
            contestants[name].step(batches[0])
            if i > 1:
                seconds[name].append(time.perf_counter() - start)
    return Duel(job, seconds["dense"], seconds["sparse"])


def numbers(option: str, text: str) -> list[float]:
    """`1,2.5` -> [1.0, 2.5]. Raises UserError for anything that is no list of positive numbers."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise UserError(f"{option} is '{text}'; give positive numbers with commas")
    return found


def whole_numbers(option: str, text: str) -> list[int]:
    """`1,2` -> [1, 2]. Raises UserError for anything else."""
    found = numbers(option, text)
    if any(number % 1 for number in found):
        raise UserError(f"{option} is '{text}'; give whole numbers with commas")
    return [int(number) for number in found]


def line(found: Duel, threads: int) -> str:
    """One row of the table."""
    job, ratio = found.job, found.ratio
    product_size = job.batch * job.d_model * job.d_sae
    dense, sparse = (1e3 * spread(seconds).middle for seconds in (found.dense, found.sparse))
    return (
        f"{job.arch:<11}{threads:>3}{job.batch:>7}{job.d_model:>8}{job.d_sae:>7}{job.k:>6}{job.k / job.d_sae:>8.2%}"
        f"{product_size:>10.1e}{dense:>10.1f}{sparse:>10.1f}{ratio.middle:>8.2f}"
        f"{f'{ratio.low:.2f}-{ratio.high:.2f}':>12}  {found.auto}{' !' if found.is_wrong else ''}"
    )


@app.command()
def main(
    arch: Annotated[str, typer.Option(help="architectures, with commas")] = "topk,batchtopk,matryoshka",
    d_model: Annotated[str, typer.Option(help="widths of the rows, with commas")] = "64,256,768",
    d_sae: Annotated[str, typer.Option(help="dictionary sizes, with commas")] = "512,2048,8192",
    density: Annotated[str, typer.Option(help="k / d_sae, with commas")] = "0.002,0.01,0.03,0.1",
    batch: Annotated[str, typer.Option(help="rows in a batch, with commas")] = "512,2048",
    threads: Annotated[str, typer.Option(help="torch's threads, with commas")] = "1,2",
    rounds: Annotated[int, typer.Option(help="times that each is measured", min=1)] = 5,
    limit: Annotated[float, typer.Option(help="leave out shapes with a larger batch * d_model * d_sae")] = 1e10,
) -> None:
    """Print one line for each shape as it is measured, and how often auto was right."""
    keep_freed_memory()  # as training does
    arches = parse_names("--arch", arch, ("topk", "batchtopk", "matryoshka", "jumprelu"))
    grid = jobs(
        arches,
        whole_numbers("--d-model", d_model),
        whole_numbers("--d-sae", d_sae),
        numbers("--density", density),
        whole_numbers("--batch", batch),
    )
    print(
        f"{'arch':<11}{'thr':>3}{'batch':>7}{'d_model':>8}{'d_sae':>7}{'k':>6}{'density':>8}{'product':>10}"
        f"{'dense ms':>10}{'sparse ms':>10}{'ratio':>8}{'quartiles':>12}  auto"
    )
    n, n_wrong, before = 0, 0, torch.get_num_threads()
    try:
        for job, n_threads in product(grid, whole_numbers("--threads", threads)):
            if job.batch * job.d_model * job.d_sae > limit:
                continue
            torch.set_num_threads(n_threads)
            found = duel(job, rounds)
            print(line(found, n_threads), flush=True)
            n, n_wrong = n + 1, n_wrong + found.is_wrong
    finally:
        torch.set_num_threads(before)
    print(f"auto took the slower kernel at {n_wrong} of {n} shapes")
    print(f"machine   {machine('cpu')}, torch {torch.__version__}")


if __name__ == "__main__":
    run_command(app)
