"""Harvest, train 12 SAEs and evaluate, again and again in one process: do memory, files, threads and disk stay flat?

python -m benchmarks.soak [--minutes 30] [--out docs/soak.svg]

A leak in a process that ends would not be seen, so all rounds are in this one, through the commands' own functions.
Exit code 1 if anything grew.
"""

import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cache_spec.command import run_command
from cache_spec.errors import UserError
from cache_spec.files import write_file

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_WARMING_UP = 3  # rounds in which imports, allocators and caches of functions fill
_MAY_GROW = 0.05  # of memory over all rounds after those; the others may not grow at all
_WIDTH, _HEIGHT, _LEFT, _GAP = 720, 70, 150, 26


class Grown(UserError):
    """Something did not stay flat."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What this process holds after a round, when the round's files are deleted."""

    minutes: float
    memory: float  # MiB that are resident
    files: int  # open ones
    threads: int
    disk: float  # MiB below the folder of the soak, temporary ones among them
    round_disk: float  # MiB that the round had written, before it was deleted


QUANTITIES = {"memory": "memory, MiB", "files": "open files", "threads": "threads", "disk": "disk, MiB"}


def commands(folder: Path) -> list[tuple[str, list[str]]]:
    """A round: module and arguments of each command."""
    cache, runs = str(folder / "cache.zarr"), str(folder / "runs")
    grid = ["--arch", "batchtopk,matryoshka", "--k", "4,6", "--seed", "0,1,2", "--d-sae", "256", "--batch-size", "512"]
    return [
        ("harvest.__main__", ["--model", "tiny", "--tokens", "20k", "--out", cache]),
        ("train.__main__", ["--cache", cache, "--out", runs, "--tokens", "15k", "--masked-fraction", "0.5", *grid]),
        ("evaluate.__main__", [runs, "--metrics", "core"]),
    ]


def run_round(folder: Path) -> None:
    """Harvest, train and evaluate into a folder. What the commands print is not shown."""
    with Path(os.devnull).open("w") as nothing:
        before, sys.stdout = sys.stdout, nothing
        try:
            for module, arguments in commands(folder):
                typer.main.get_command(import_module(module).app).main(args=arguments, standalone_mode=False)
        finally:
            sys.stdout = before


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sample(began: float, folder: Path, round_bytes: int) -> Sample:
    """Look at this process and at the folder. Linux alone says so much."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tasks = list(Path("/proc/self/task").iterdir())
    return Sample(
        minutes=(time.monotonic() - began) / 60,
        memory=resident / 2**20,
        files=len(list(Path("/proc/self/fd").iterdir())),
        threads=max(len(tasks), threading.active_count()),
        disk=bytes_below(folder) / 2**20,
        round_disk=round_bytes / 2**20,
    )


def growth(samples: Sequence[Sample], name: str) -> float:
    """How much a quantity grew from the first to the last round after warming up, by the slope through all of them."""
    values = np.array([getattr(each, name) for each in samples[_WARMING_UP:]], float)
    if len(values) < 2:
        return 0.0
    slope = np.polyfit(np.arange(len(values)), values, 1)[0]
    return float(slope * (len(values) - 1))


def grown(samples: Sequence[Sample]) -> list[str]:
    """What did not stay flat, in words."""
    found = []
    for name, label in QUANTITIES.items():
        by = growth(samples, name)
        first = float(getattr(samples[min(_WARMING_UP, len(samples) - 1)], name))
        allowed = _MAY_GROW * first if name == "memory" else 0.5
        if by > allowed:
            found.append(f"{label} grew by {by:,.1f} from {first:,.1f}")
    return found


def table(samples: Sequence[Sample]) -> str:
    """The rounds, one a line, and the growth after warming up."""
    lines = [
        f"{'round':>6}{'minutes':>9}{'memory MiB':>12}{'files':>7}{'threads':>9}{'disk MiB':>10}{'written MiB':>13}"
    ]
    for number, each in enumerate(samples, 1):
        lines.append(
            f"{number:>6}{each.minutes:>9.1f}{each.memory:>12.1f}{each.files:>7}{each.threads:>9}"
            f"{each.disk:>10.1f}{each.round_disk:>13.1f}"
        )
    grew = {name: growth(samples, name) for name in QUANTITIES}
    lines.append(
        f"{'growth':>6}{'':>9}{grew['memory']:>+12.1f}{grew['files']:>+7.1f}{grew['threads']:>+9.1f}{grew['disk']:>+10.1f}"
    )
    return "\n".join(lines)


def picture(samples: Sequence[Sample]) -> str:
    """A small SVG: each quantity over the minutes, from 0 up, so that flat looks flat."""
    end = max(each.minutes for each in samples) or 1.0
    parts = []
    for row, (name, label) in enumerate(QUANTITIES.items()):
        values = [float(getattr(each, name)) for each in samples]
        top, base = max(*values, 1.0) * 1.1, (row + 1) * (_HEIGHT + _GAP)
        points = " ".join(
            f"{_LEFT + each.minutes / end * (_WIDTH - _LEFT - 70):.1f},{base - value / top * _HEIGHT:.1f}"
            for each, value in zip(samples, values, strict=True)
        )
        parts += [
            f'<text x="0" y="{base - _HEIGHT / 2:.0f}">{label}</text>',
            f'<path d="M{_LEFT} {base}H{_WIDTH - 70}" stroke="#8c959f" fill="none"/>',
            f'<polyline points="{points}" fill="none" stroke="#0969da" stroke-width="2"/>',
            f'<text x="{_WIDTH - 64}" y="{base - values[-1] / top * _HEIGHT + 4:.0f}">{values[-1]:,.0f}</text>',
        ]
    height = len(QUANTITIES) * (_HEIGHT + _GAP) + 24
    parts.append(f'<text x="{_LEFT}" y="{height - 6}">0 to {end:.0f} minutes, {len(samples)} rounds</text>')
    style = 'font-family="sans-serif" font-size="13" fill="#6e7781"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {style}>'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="How long; a round that has begun is finished.", min=0.0)] = 30.0,
    out: Annotated[Path | None, typer.Option(help="Draw what was seen, such as docs/soak.svg.")] = None,
) -> None:
    """Repeat rounds of harvest, train and evaluate, print what this process holds after each, and say what grew."""
    samples: list[Sample] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        tempfile.tempdir = str(Path(place) / "temporary")  # so that what is left there is seen
        Path(tempfile.tempdir).mkdir()
        while not samples or samples[-1].minutes < minutes:
            folder = Path(place) / "round"
            run_round(folder)
            n_bytes = bytes_below(folder)
            shutil.rmtree(folder)
            samples.append(sample(began, Path(place), n_bytes))
            print(table(samples).splitlines()[len(samples)], flush=True)
        tempfile.tempdir = None
    print(f"\n{table(samples)}")
    if out is not None:
        write_file(out, picture(samples).encode())
    if found := grown(samples):
        raise Grown(f"not flat over {len(samples)} rounds: {'; '.join(found)}; look for what is kept between rounds")


if __name__ == "__main__":
    run_command(app)
