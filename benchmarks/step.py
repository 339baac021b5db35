"""One training step: ours, dictionary_learning's, SAELens's, sparsify's and saev's, and the bare products.

    python -m benchmarks.step [--arch topk] [--shape 512,8192,32,2048] [--precision fp32,bf16] [--dead 0.1]
        [--dictionary-learning CHECKOUT --dictionary-learning-env VENV] [--saelens VENV] [--sparsify VENV]
        [--saev CHECKOUT --saev-env VENV] [--json OUT]

Each contestant runs in a process of its own, with the Python of an environment that has it, and they are timed in
turn (benchmarks/contest.py). All train on the same rows with the same k; every peer with its own fastest documented
setting, which the table names. `x five` is the time over that of the five products of a dense step alone, `x one` over
the encoder's product alone, `x ours` over our fastest kernel: medians of the ratios round by round. `floor` is the
modelled least time (benchmarks/model.py) at the rates of the products and of memory measured in the same rounds, on a
GPU at an H200's; `share` is how much of our time that explains.
"""

import json
import platform
from dataclasses import asdict, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.contest import KEEPING, WAITING, ContestantGone, Entrant, Result, Spread, compete, ratio, spread
from benchmarks.jobs import PRECISIONS, describe, machine, make_job, parse_kernels, parse_names
from benchmarks.model import H200, Rates, bill_in_words, floor_seconds
from benchmarks.peers.floors import N_COPIED
from benchmarks.peers.job import Job
from cache_spec.command import run_command
from cache_spec.errors import UserError

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu")
FIVE, ONE, COPY = "five dense products", "encoder product", "memory copied"
Places = dict[str, tuple[Path | None, Path | None]]
"""Checkout and environment of each peer."""
NOWHERE = (None, None)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def floors(job: Job) -> list[Entrant]:
    """What calibrates the rest."""
    names = {"five": FIVE, "encoder": ONE, "copy": COPY}
    return [
        Entrant(name=name, job=replace(job, contestant="floors", variant=variant)) for variant, name in names.items()
    ]


def ours(job: Job, kernels: list[str]) -> list[Entrant]:
    """One of each kernel."""
    return [Entrant(name=f"granary {name}", job=replace(job, variant=name)) for name in kernels]


def peers(job: Job, places: Places) -> list[Entrant]:
    """The others, of those whose place was given; each in every setting that may be its fastest."""
    variants = {"dictionary_learning": [""], "saelens": [""], "sparsify": ["signum", "adam"], "saev": [""]}
    if job.arch == "topk":
        variants["saelens"].append("sparse")
    if job.device.startswith("cuda"):
        variants["saelens"].append("compiled")
    return [
        Entrant(
            name=f"{file} {variant}".strip(),
            job=replace(job, contestant=file, variant=variant, source=str(source or "")),
            env=env,
        )
        for file, (source, env) in places.items()
        if (source, env) != NOWHERE
        for variant in variants[file]
    ]


def rates_of(results: dict[str, Result], device: str) -> Rates:
    """Of the products and of memory: on a CPU as measured in these rounds, on a GPU an H200's."""
    if device.startswith("cuda"):
        return Rates(*H200)
    job = results[ONE].entrant.job
    product_seconds, copy_seconds = (spread(results[name].seconds).middle for name in (ONE, COPY))
    return Rates(2 * job.batch * job.d_model * job.d_sae / product_seconds, 2 * N_COPIED / copy_seconds)


def table(results: list[Result], rates: Rates) -> list[dict[str, Any]]:
    """The rows, as numbers; the fastest first."""
    by_name = {result.entrant.name: result for result in results}
    own = [result for result in results if result.entrant.job.contestant == "granary"]
    best = min(own, key=lambda result: spread(result.seconds).middle) if own else None
    rows = []
    for result in sorted(results, key=lambda result: spread(result.seconds).middle):
        job = result.entrant.job
        row: dict[str, Any] = {
            "name": result.entrant.name,
            "job": asdict(job),
            "seconds": result.seconds,
            "spread": asdict(spread(result.seconds)),
            "before": result.before,
            "after": result.after,
            "settings": result.settings,
            "versions": result.versions,
        }
        if result.entrant.name != COPY:
            row |= {f"x_{key}": asdict(ratio(result, by_name[name])) for key, name in (("five", FIVE), ("one", ONE))}
            if best is not None and job.contestant != "floors":
                row["x_ours"] = asdict(ratio(result, best))
        if job.contestant == "granary":
            row["floor_seconds"] = floor_seconds(job, job.variant, rates)
            row["bill"] = bill_in_words(job, job.variant, rates)
        rows.append(row)
    return rows


def head() -> str:
    return (
        f"{'contestant':<26}{'ms':>9}{'quartiles':>16}{'x five':>8}{'x one':>8}{'x ours':>8}{'quartiles':>14}"
        f"{'floor ms':>10}{'share':>7}{'FVU':>16}{'L0':>8}{'dead':>7}"
    )


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    times = Spread(*(1e3 * value for value in row["spread"].values()))
    quartiles = f"{times.low:.1f}-{times.high:.1f}"
    text = f"{row['name']:<26}{times.middle:>9.1f}{quartiles:>16}"
    for key in ("x_five", "x_one", "x_ours"):
        text += f"{row[key]['middle']:>8.2f}" if key in row else f"{'':>8}"
    text += f"{'{low:.2f}-{high:.2f}'.format(**row['x_ours']):>14}" if "x_ours" in row else f"{'':>14}"
    if "floor_seconds" in row:
        text += f"{1e3 * row['floor_seconds']:>10.2f}{1e3 * row['floor_seconds'] / times.middle:>7.0%}"
    else:
        text += f"{'':>17}"
    if row["job"]["contestant"] == "floors":
        return text
    before, after = row["before"], row["after"]
    fvu = f"{before['fvu']:.3f} -> {after['fvu']:.3f}"
    return f"{text}{fvu:>16}{after['l0']:>8.1f}{after['n_dead']:>7}"


def one_table(entrants: list[Entrant], *, rounds: int, steps: int, n_threads: int | None) -> list[dict[str, Any]]:
    """Time one architecture, shape and precision, and print its part of the table."""
    results, missing = compete(entrants, rounds=rounds, steps=steps, warm_up=2, n_threads=n_threads)
    job, by_name = entrants[0].job, {result.entrant.name: result for result in results}
    for name in (FIVE, ONE, COPY):
        if name not in by_name:
            raise ContestantGone(next(reason for reason in missing if reason.startswith(name)))
    rows = table(results, rates := rates_of(by_name, job.device))
    print(f"\n{describe(job)}")
    print(f"rates: {rates.operations / 1e12:.3g} TFLOP/s, {rates.bytes / 1e9:.3g} GB/s")
    bills = [f"model: {row['bill']}" for row in rows if "bill" in row]
    for text in (*map(line, rows), *bills, *(f"left out: {reason}" for reason in missing)):
        print(text, flush=True)
    return rows


def print_foot(rows: list[dict[str, Any]], device: str, absent: list[str], settings: dict[str, str]) -> None:
    """Machine, date, versions, and each contestant's settings."""
    print(f"\nmachine   {machine(device)}")
    print(f"date      {date.today()}, Python {platform.python_version()}")
    print(f"settings  {' '.join(f'{key}={value}' for key, value in settings.items())}, for all")
    seen: dict[str, str] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        text = f"{row['name']}, {row['job']['precision']}"
        seen.setdefault(text, f"  {text:<34}{row['settings']} ({versions})")
    print(*seen.values(), sep="\n")
    if absent:
        print(f"not here  {', '.join(absent)}: name where they are with {', '.join(map(_option, absent))}")


def _option(peer: str) -> str:
    return f"--{peer.replace('_', '-')}"


def check_places(places: Places) -> None:
    """Raises UserError for a place that is none: who names a peer wants it timed."""
    for place in (place for pair in places.values() for place in pair if place is not None):
        if not place.is_dir():
            raise UserError(f"{place} is no folder; give a peer's checkout or its virtual environment")


@app.command()
def main(
    arch: Annotated[str, typer.Option(help="architectures, with commas")] = ",".join(ARCHITECTURES),
    shape: Annotated[
        list[str] | None, typer.Option(help="d_model,d_sae,k,batch; repeatable [default: 512,8192,32,2048]")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or both")] = "fp32,bf16",
    kernel: Annotated[str, typer.Option(help="ours; default: all that the device can run")] = "",
    dead: Annotated[float, typer.Option(help="share of latents that are dead, so that AuxK works", min=0, max=0.9)] = 0,
    rounds: Annotated[int, typer.Option(help="times that each is measured, after two for warming up", min=1)] = 10,
    steps: Annotated[int, typer.Option(help="steps in a round; more on a GPU", min=1)] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="threads of each contestant; default: as it likes", min=1)] = None,
    dictionary_learning: Annotated[Path | None, typer.Option(help="a checkout of it")] = None,
    dictionary_learning_env: Annotated[Path | None, typer.Option(help="an environment with what it imports")] = None,
    saelens: Annotated[Path | None, typer.Option(help="a virtual environment with sae-lens")] = None,
    sparsify: Annotated[Path | None, typer.Option(help="a virtual environment with eai-sparsify")] = None,
    saev: Annotated[Path | None, typer.Option(help="a checkout of it")] = None,
    saev_env: Annotated[Path | None, typer.Option(help="an environment with what it imports")] = None,
    as_shipped: Annotated[
        bool, typer.Option("--as-shipped", help="each with the allocator as its own users have it, not all with ours")
    ] = False,
    out: Annotated[Path | None, typer.Option("--json", help="write every number here")] = None,
) -> None:
    """Print one table of all contestants, shapes, architectures and precisions."""
    places: Places = {
        "dictionary_learning": (dictionary_learning, dictionary_learning_env if dictionary_learning else None),
        "saelens": (None, saelens),
        "sparsify": (None, sparsify),
        "saev": (saev, saev_env if saev else None),
    }
    check_places(places)
    kernels = parse_kernels(kernel, device)
    architectures = parse_names("--arch", arch, ARCHITECTURES)
    precisions = parse_names("--precision", precision, PRECISIONS)
    if dead and "jumprelu" in architectures:
        architectures.remove("jumprelu")
        print("left out: jumprelu, which has no AuxK")
    settings = WAITING if as_shipped else {**WAITING, **KEEPING}
    print(head())
    rows: list[dict[str, Any]] = []
    for sizes, name, bits in product(shape or ["512,8192,32,2048"], architectures, precisions):
        job = make_job(name, sizes, bits, device, dead)
        entrants = [*floors(job), *ours(job, kernels), *peers(job, places)]
        entrants = [replace(entrant, settings=settings) for entrant in entrants]
        rows += one_table(entrants, rounds=rounds, steps=steps, n_threads=threads)
    absent = [peer for peer, place in places.items() if place == NOWHERE]
    print_foot(rows, device, absent, settings)
    if out is not None:
        facts = {"machine": machine(device), "date": str(date.today()), "environment": settings, "rows": rows}
        out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    run_command(app)
