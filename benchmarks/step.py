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
import os
import platform
from dataclasses import asdict
from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.contest import ENVIRONMENT, ContestantGone, Entrant, Result, Spread, compete, ratio, spread
from benchmarks.model import H200, Rates, describe, floor_seconds
from benchmarks.peers.floors import N_COPIED
from benchmarks.peers.job import Job
from cache_spec.command import run_command
from cache_spec.errors import UserError

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu")
PRECISIONS = ("fp32", "bf16")
FIVE, ONE, COPY = "five dense products", "encoder product", "memory copied"
LR, LR_DEAD, LR_JUMPRELU = 3e-4, 1e-5, 7e-5  # with a high rate the dead would come to life, and JumpReLU's L0 run away
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """`512,8192,32,2048` -> d_model, d_sae, k, batch. Raises UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--shape is '{text}'; give d_model,d_sae,k,batch such as 512,8192,32,2048")
    d_model, d_sae, k, batch = map(int, parts)
    if k > d_sae:
        raise UserError(f"--shape is '{text}' with k {k} above d_sae {d_sae}; give d_model,d_sae,k,batch")
    return d_model, d_sae, k, batch


def parse_names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """`a,b` -> [a, b]. Raises UserError for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name} is unknown; it is one of {', '.join(known)}")
    return names


def jobs(arch: str, shape: str, precision: str, device: str, dead: float) -> dict[str, Any]:
    """The facts that all contestants of one table share."""
    d_model, d_sae, k, batch = parse_shape(shape)
    lr = LR_DEAD if dead else LR_JUMPRELU if arch == "jumprelu" else LR
    return {
        "arch": arch,
        "d_model": d_model,
        "d_sae": d_sae,
        "k": k,
        "batch": batch,
        "precision": precision,
        "device": device,
        "dead": dead,
        "lr": lr,
    }


def floors(shared: dict[str, Any]) -> list[Entrant]:
    """What calibrates the rest."""
    names = {"five": FIVE, "encoder": ONE, "copy": COPY}
    return [
        Entrant(name=name, job=Job(contestant="floors", variant=variant, **shared)) for variant, name in names.items()
    ]


def ours(shared: dict[str, Any], kernels: list[str]) -> list[Entrant]:
    """One of each kernel."""
    return [Entrant(name=f"granary {name}", job=Job(contestant="granary", variant=name, **shared)) for name in kernels]


def peers(shared: dict[str, Any], places: dict[str, tuple[Path | None, Path | None]]) -> list[Entrant]:
    """The others, of those whose place (checkout, environment) was given; each in every setting that may be fastest."""
    variants = {"dictionary_learning": [""], "saelens": [""], "sparsify": ["signum", "adam"], "saev": [""]}
    if shared["arch"] == "topk" and shared["precision"] == "fp32":
        variants["saelens"].append("sparse")
    if shared["device"].startswith("cuda"):
        variants["saelens"].append("compiled")
    entrants = []
    for file, (source, env) in places.items():
        if source is None and env is None:
            continue
        for variant in variants[file]:
            job = Job(contestant=file, variant=variant, source=str(source or ""), **shared)
            entrants.append(Entrant(name=f"{file} {variant}".strip(), job=job, env=env))
    return entrants


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
            row["bill"] = describe(job, job.variant, rates)
        rows.append(row)
    return rows


def head() -> str:
    return (
        f"{'contestant':<26}{'ms':>9}{'quartiles':>16}{'x five':>8}{'x one':>8}{'x ours':>8}{'quartiles':>14}"
        f"{'floor ms':>10}{'share':>7}{'FVU':>16}{'L0':>8}"
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
    return f"{text}{fvu:>16}{after['l0']:>8.1f}"


def one_table(entrants: list[Entrant], *, rounds: int, steps: int, n_threads: int | None) -> list[dict[str, Any]]:
    """Time one architecture, shape and precision, and print its part of the table."""
    results, missing = compete(entrants, rounds=rounds, steps=steps, warm_up=2, n_threads=n_threads)
    job, by_name = entrants[0].job, {result.entrant.name: result for result in results}
    for name in (FIVE, ONE, COPY):
        if name not in by_name:
            raise ContestantGone(next(reason for reason in missing if reason.startswith(name)))
    rows = table(results, rates := rates_of(by_name, job.device))
    dead = f", {job.dead:.0%} dead" if job.dead else ""
    print(
        f"\n{job.arch}, {job.precision}: d_model {job.d_model}, d_sae {job.d_sae}, k {job.k}, batch {job.batch}{dead}"
    )
    print(f"rates: {rates.operations / 1e12:.3g} TFLOP/s, {rates.bytes / 1e9:.3g} GB/s")
    for text in (*map(line, rows), *(f"left out: {reason}" for reason in missing)):
        print(text, flush=True)
    return rows


def machine(device: str) -> str:
    """Processor or GPU, threads, and what could make a difference."""
    name = next((text.split(":")[1] for text in _cpuinfo() if text.startswith("model name")), platform.processor())
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{name.strip()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def print_foot(rows: list[dict[str, Any]], device: str, absent: list[str]) -> None:
    """Machine, date, versions, each contestant's settings, and the bills."""
    print(f"\nmachine   {machine(device)}")
    print(f"date      {date.today()}, Python {platform.python_version()}")
    print(f"settings  {' '.join(f'{key}={value}' for key, value in ENVIRONMENT.items())}, for all")
    seen: dict[str, str] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        text = f"{row['name']}, {row['job']['precision']}"
        seen.setdefault(text, f"  {text:<34}{row['settings']} ({versions})")
        if "bill" in row:
            seen.setdefault(row["bill"], f"  model, {row['job']['precision']}: {row['bill']}")
    print(*seen.values(), sep="\n")
    if absent:
        print(f"not here  {', '.join(absent)}: name where they are with {', '.join(map(_option, absent))}")


def _option(peer: str) -> str:
    return f"--{peer.replace('_', '-')}"


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
    out: Annotated[Path | None, typer.Option("--json", help="write every number here")] = None,
) -> None:
    """Print one table of all contestants, shapes, architectures and precisions."""
    places = {
        "dictionary_learning": (dictionary_learning, dictionary_learning_env if dictionary_learning else None),
        "saelens": (None, saelens),
        "sparsify": (None, sparsify),
        "saev": (saev, saev_env if saev else None),
    }
    for place in (place for pair in places.values() for place in pair if place is not None):
        if not place.is_dir():
            raise UserError(f"{place} is no folder; give a peer's checkout or its virtual environment")
    kernels = kernel.split(",") if kernel else ["dense", "sparse", *(["triton"] if device.startswith("cuda") else [])]
    absent = [name for name, pair in places.items() if pair == (None, None)]
    print(head())
    rows: list[dict[str, Any]] = []
    names = product(
        shape or ["512,8192,32,2048"],
        parse_names("--arch", arch, ARCHITECTURES),
        parse_names("--precision", precision, PRECISIONS),
    )
    for sizes, name, bits in names:
        if dead and name == "jumprelu":
            print("\njumprelu has no AuxK, so there is nothing to time with dead latents")
            continue
        shared = jobs(name, sizes, bits, device, dead)
        entrants = [*floors(shared), *ours(shared, kernels), *peers(shared, places)]
        rows += one_table(entrants, rounds=rounds, steps=steps, n_threads=threads)
    print_foot(rows, device, absent)
    if out is not None:
        facts = {"machine": machine(device), "date": str(date.today()), "environment": ENVIRONMENT, "rows": rows}
        out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    run_command(app)
