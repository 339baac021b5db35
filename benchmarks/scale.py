"""Time and money of a harvest and a training on many GPUs: the model of `benchmarks.scale_model`, checked and used.

    python -m benchmarks.scale check [--tokens 256k]          what it says of this machine, beside what was measured
    python -m benchmarks.scale table [--gpus 1,8,64] ...      500M tokens of Gemma-2-2B, and an SAE of 1M latents

`check` measures this machine's bare rates, and how much of them one small model and one small training step keep; from
these it predicts other sizes, and several processes. `x` is the predicted time over the measured one: 1 is right, below
1 the model is too hopeful. Everything runs on one thread a process. `table` only computes: every rate in it is an
option, and docs/scale.md says where the defaults are from.
"""

from dataclasses import replace
from typing import Annotated

import typer

from benchmarks.jobs import make_job
from benchmarks.model import H200, Rates
from benchmarks.peers.job import Job
from benchmarks.scale_model import (
    GEMMA_2_2B,
    Bill,
    Machines,
    cache_bytes,
    harvest_bill,
    link_seconds,
    state_bytes,
    sweep_bill,
    wide_bill,
)
from cache_spec.command import run_command
from cache_spec.counts import parse_count
from cache_spec.errors import UserError
from harvest.forecast import duration, size

MODEL_SHARE, STEP_SHARE, DENSE_SHARE = 0.34, 0.55, 0.45  # measured on an H200: docs/scale.md
TERA, GIGA = 1e12, 1e9
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def parse_gpus(text: str) -> list[int]:
    """`1,8,64` -> [1, 8, 64]. Raises UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--gpus is '{text}'; give numbers of GPUs with commas, such as 1,8,64")
    return [int(part) for part in parts]


def print_rows(title: str, bills: dict[int, tuple[Bill, Machines]]) -> None:
    """A table with a row for each number of GPUs: when it ends, what it costs, and what limits it."""
    print(f"\n{title}")
    print(f"{'GPUs':>6}{'time':>16}{'price':>10}   limit, then the other parts")
    for gpus, (bill, machines) in bills.items():
        parts = {**bill.parts, **({"planning": bill.before} if bill.before else {})}
        others = sorted((name for name in parts if name != bill.limit), key=lambda name: -parts[name])
        words = ", ".join(f"{name} {duration(parts[name])}" for name in (bill.limit, *others))
        print(f"{gpus:>6}{duration(bill.seconds):>16}{bill.price(machines):>10,.0f}   {words}")


@app.command()
def table(
    gpus: Annotated[str, typer.Option(help="numbers of GPUs, with commas")] = "1,8,64",
    tokens: Annotated[str, typer.Option(help="rows of each variant")] = "500M",
    saes: Annotated[int, typer.Option(help="SAEs of the paper's sweep, 4096 latents each", min=1)] = 48,
    operations: Annotated[float, typer.Option(help="TFLOP/s of a GPU's bare products in bf16")] = H200[0] / TERA,
    memory: Annotated[float, typer.Option(help="TB/s of a GPU's memory")] = H200[1] / TERA,
    gpu_gb: Annotated[float, typer.Option(help="GB of a GPU's memory")] = 141.0,
    model_share: Annotated[float, typer.Option(help="of the products' rate, kept by a harvest")] = MODEL_SHARE,
    step_share: Annotated[float, typer.Option(help="of the floor, kept by a training step")] = STEP_SHARE,
    dense_share: Annotated[float, typer.Option(help="the same of the dense kernel")] = DENSE_SHARE,
    disk: Annotated[float, typer.Option(help="GB/s of a node's link to the caches")] = 2.0,
    store: Annotated[float, typer.Option(help="GB/s of the disk or store, to all nodes together")] = 20.0,
    near: Annotated[float, typer.Option(help="GB/s from a GPU to the others of its node")] = 300.0,
    far: Annotated[float, typer.Option(help="GB/s from a GPU to those of other nodes")] = 20.0,
    plan_rate: Annotated[float, typer.Option(help="thousand tokens/s that planning reads and cuts")] = 300.0,
    dead: Annotated[float, typer.Option(help="share of a million latents that are dead", min=0, max=1)] = 0.1,
    price: Annotated[float, typer.Option(help="of a GPU for an hour; 1 counts GPU hours")] = 1.0,
) -> None:
    """Print what it takes, and what limits it."""
    n_tokens, sizes = parse_count(tokens, "--tokens"), parse_gpus(gpus)
    rates = Rates(operations * TERA, memory * TERA)
    one = Machines(
        gpus=1,
        rates=rates,
        gpu_bytes=gpu_gb * GIGA,
        model_share=model_share,
        step_share=step_share,
        dense_share=dense_share,
        disk=disk * GIGA,
        store=store * GIGA,
        near=near * GIGA,
        far=far * GIGA,
        plan_rate=plan_rate * 1e3,
        price=price,
    )
    given = {n: replace(one, gpus=n) for n in sizes}
    print(f"cache of {n_tokens:,} rows, clean and masked: {size(int(cache_bytes(2304, n_tokens, 2)))}")
    print_rows(
        f"harvest, {GEMMA_2_2B.operations / 1e9:.2f} GFLOP a token and variant",
        {n: (harvest_bill(GEMMA_2_2B, n_tokens, 2, machines), machines) for n, machines in given.items()},
    )
    paper = make_job("batchtopk", "2304,4096,80,2048", "bf16", "cuda")
    print_rows(
        f"{saes} SAEs of 4096 latents, k 80, batch 2048, each whole on one GPU",
        {n: (sweep_bill(paper, saes, n_tokens, 2, "triton", machines), machines) for n, machines in given.items()},
    )
    print_wide(make_job("topk", "2304,1048576,80,4096", "bf16", "cuda", dead), n_tokens, given)


def print_wide(job: Job, n_tokens: int, given: dict[int, Machines]) -> None:
    """One SAE on all GPUs. Several can train it with the dense kernel only, so one alone may be ahead of two."""
    kernels = {n: "triton" if n == 1 else "dense" for n in given}
    bills = {n: (wide_bill(job, n_tokens, 1, kernels[n], machines), machines) for n, machines in given.items()}
    title = f"one SAE of {job.d_sae:,} latents ({job.dead:.0%} dead), {job.arch}, k {job.k}, batch {job.batch}"
    print_rows(f"{title}, its latents on all GPUs", bills)
    for n, machines in given.items():
        needed = state_bytes(job, kernels[n], n)
        fits = "fits" if needed < machines.gpu_bytes else f"does NOT fit into {size(int(machines.gpu_bytes))}"
        links = f"links {1e3 * link_seconds(job, machines):.2f} ms a step"
        print(f"{n:>6} GPUs, kernel {kernels[n]}: {size(int(needed))} on each, {fits}; {links}")


@app.command()
def check(
    tokens: Annotated[str, typer.Option(help="rows of each variant of the larger harvest")] = "256k",
    rounds: Annotated[int, typer.Option(help="how often each thing is timed", min=1)] = 3,
    toy: Annotated[bool, typer.Option("--toy", help="sizes of no interest, to see this file work")] = False,
) -> None:
    """Print what the model says of this machine beside what was measured."""
    from benchmarks.scale_check import print_check

    print_check(parse_count(tokens, "--tokens"), rounds, toy)


if __name__ == "__main__":
    run_command(app)
