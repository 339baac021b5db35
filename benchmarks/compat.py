"""Does every tool see the SAE that we trained? All architectures and transcoders, in each format, on real rows.

SAELens, sparsify and dictionary_learning cannot share our environment, so `make test-compat` gives them .venv-compat.
Without --runs this harvests the embedded model and trains a short run of everything that `python -m train` can make.

    python -m benchmarks.compat [--runs demo/runs] [--tools saelens,sparsify] [--dictionary-learning CHECKOUT]
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_spec.cache import ActivationCache
from cache_spec.command import run_command
from cache_spec.errors import UserError
from train.exported import write_folder
from train.foreign import read_folder
from train.names import available, find
from train.run_folder import load_run
from train.stored import Stored

ROOT = Path(__file__).parent.parent
N_ROWS = 4096
TOLERANCE = 1e-5  # of the largest value in the tensor
MOST_TIES = 4  # rows of 4,096 in which a code on the edge, within rounding, may be on in one and off in the other
INPUT, TARGET = "resid_post.1", "resid_post.2"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Differs(UserError):
    """A tool computes something else than we do."""

    exit_code = 1


@dataclass(kw_only=True)
class Cell:
    """What became of one run in one tool. reason: why it is not possible, empty if it is."""

    run: str
    tool: str
    kind: str = ""
    reason: str = ""
    approximate: bool = False
    encode: float = 0.0
    decode: float = 0.0
    n_ties: int = 0

    @property
    def fails(self) -> bool:
        return max(self.encode, self.decode) > TOLERANCE or self.n_ties > MOST_TIES

    def __str__(self) -> str:
        if self.reason:
            return "-"
        ties = f" {self.n_ties} ties" if self.n_ties else ""
        return f"{'~' if self.approximate else ''}{self.kind} {self.encode:.0e} {self.decode:.0e}{ties}"


def make_runs(folder: Path) -> Path:
    """Short runs of every architecture, as an SAE, a transcoder and a skip transcoder."""
    cache, runs = folder / "cache.zarr", folder / "runs"
    _run("harvest", "--model", "tiny", "--layers", f"{INPUT},{TARGET}", "--tokens", "20k", "--out", str(cache))
    grid = ["--cache", str(cache), "--out", str(runs), "--hook", INPUT, "--arch", ",".join(available("architectures"))]
    short = ["--k", "6", "--d-sae", "256", "--tokens", "40k", "--batch-size", "512", "--lr", "1e-3"]
    for more in ([], ["--target-hook", TARGET], ["--target-hook", TARGET, "--skip"]):
        _run("train", *grid, *short, "--masked-fraction", "0.5", *more)
    return runs


def _run(room: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", room, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def rows_of(run: Path) -> Tensor:
    """[n, d_model] held-out rows of the cache that a run was trained on, as they are in the model."""
    facts = load_run(run).facts["cache"]
    cache = ActivationCache.open(facts["path"])
    hook = cache.hook(facts["hook"])
    stored = cache.activations(hook.name, "clean", cache.held_out_shards[0])[:N_ROWS]
    return torch.from_numpy(stored.astype("float32")) * hook.scale_factor


def compare(tool: str, runs: list[Path], python: Path, folder: Path, checkout: str) -> list[Cell]:
    """Export every run for one tool, let the tool compute, and compare."""
    cells, jobs = [], []
    for run in runs:
        cell, written = _export(tool, run, folder / f"{tool}-{run.name}")
        cells.append(cell)
        if written is not None:
            save_file({"x": rows_of(run)}, folder / f"{run.name}.rows")
            jobs.append([str(written), str(folder / f"{run.name}.rows"), str(folder / f"{tool}-{run.name}.theirs")])
    reader = str(ROOT / "benchmarks" / "compat_reader.py")
    done = subprocess.run([python, reader, tool, json.dumps(jobs), checkout], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Differs(f"{tool} does not load a folder that was made for it: {last}")
    for cell, run in zip(cells, runs, strict=True):
        if not cell.reason:
            ours = read_folder(_written(folder / f"{tool}-{run.name}") if cell.approximate else run)
            theirs = load_file(folder / f"{tool}-{run.name}.theirs")
            _fill(cell, ours, load_file(folder / f"{run.name}.rows")["x"], theirs)
    return cells


def _export(tool: str, run: Path, out: Path) -> tuple[Cell, Path | None]:
    """Write a run for the tool; only approximately, where the format cannot say it."""
    stored, approximate = read_folder(run), False
    try:
        made = find("formats", tool).write(stored)
    except UserError as error:
        if "--approximate" not in str(error):
            return Cell(run=run.name, tool=tool, reason=str(error)), None
        made, approximate = find("formats", tool).write(stored, approximate=True), True
    write_folder(out / made.subfolder, made.files)
    return Cell(run=run.name, tool=tool, kind=made.kind, approximate=approximate), out / made.subfolder


def _written(out: Path) -> Path:
    """The folder that was written: `out`, or the one in it."""
    inside = [path for path in out.iterdir() if path.is_dir()]
    return inside[0] if inside else out


@torch.no_grad()
def _fill(cell: Cell, stored: Stored, x: Tensor, theirs: dict[str, Tensor]) -> None:
    """Set the largest differences, relative to the largest value; rows with other codes on are counted apart."""
    codes, made = stored.sae.encode(x), stored.sae(x)
    assert codes.count_nonzero() > 0
    same = ((codes > 0) == (theirs["codes"] > 0)).all(1)
    cell.n_ties = int((~same).sum())
    cell.encode = relative(codes[same], theirs["codes"][same])
    cell.decode = relative(made[same], theirs["made"][same])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def print_table(cells: list[Cell], tools: list[str]) -> None:
    """A line for each run, a column for each tool, and below it why cells are empty."""
    runs = dict.fromkeys(cell.run for cell in cells)
    found = {(cell.run, cell.tool): str(cell) for cell in cells}
    widths = [max(len(text) for text in (tool, *(found[run, tool] for run in runs))) + 2 for tool in tools]
    first = max(map(len, runs)) + 2
    print(
        "class, largest relative difference of encode and of decode; ~ a top-k, only close to the run; - not possible"
    )
    print(f"{'run':<{first}}" + "".join(f"{tool:<{width}}" for tool, width in zip(tools, widths, strict=True)).rstrip())
    for run in runs:
        cols = "".join(f"{found[run, tool]:<{width}}" for tool, width in zip(tools, widths, strict=True))
        print(f"{run:<{first}}{cols}".rstrip())
    for tool, reason in dict.fromkeys((cell.tool, cell.reason) for cell in cells if cell.reason):
        print(f"- {tool}: {reason}")


@app.command()
def main(
    runs: Annotated[Path | None, typer.Option(help="folder of runs; default: short ones of everything")] = None,
    python: Annotated[Path, typer.Option(help="an interpreter that has the tools")] = ROOT / ".venv-compat/bin/python",
    tools: Annotated[str, typer.Option(help="comma separated; default: all")] = "saelens,dictionary_learning,sparsify",
    dictionary_learning: Annotated[
        str, typer.Option(help="a checkout of dictionary_learning, to be used for the package")
    ] = "",
) -> None:
    """Compare encode and decode of every run with each tool's, on held-out rows of the run's cache."""
    if not python.exists():
        raise UserError(f"there is no {python}; make test-compat makes it, or name an interpreter with --python")
    chosen = [name.strip() for name in tools.split(",") if name.strip()]
    for name in chosen:
        find("formats", name)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        runs = runs or make_runs(folder)
        folders = sorted(path.parent for path in runs.glob("*/cfg.json"))
        if not folders:
            raise UserError(f"{runs} holds no complete runs; make some with `make demo`, or leave --runs out")
        cells = [
            cell
            for tool in chosen
            for cell in compare(
                tool, folders, python, folder, dictionary_learning if tool == "dictionary_learning" else ""
            )
        ]
    print_table(cells, chosen)
    if wrong := [f"{cell.run} in {cell.tool}" for cell in cells if cell.fails]:
        raise Differs(f"{', '.join(wrong)}: more than {TOLERANCE:.0e} apart, or {MOST_TIES} rows with other codes on")


if __name__ == "__main__":
    run_command(app)
