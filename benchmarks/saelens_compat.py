"""Does SAELens see the SAE that we trained? Every architecture and transcoder, on real rows of the cache.

SAELens cannot share our environment, so it gets one of its own, .venv-compat, made on the first call. Without --runs
this harvests the embedded model and trains a short run of everything that `python -m train` can make.

    python -m benchmarks.saelens_compat [--runs demo/runs] [--python OTHER/bin/python]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from cache_spec.cache import ActivationCache
from cache_spec.command import run_command
from cache_spec.errors import UserError
from train.names import available
from train.run_folder import load_run

ROOT = Path(__file__).parent.parent
SAELENS = "sae-lens==6.54.12"
THEIRS = ("standard", "topk", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder",
          "jumprelu_skip_transcoder")  # fmt: skip
N_ROWS = 4096
TOLERANCE = 1e-5  # of the largest value in the tensor
INPUT, TARGET = "resid_post.1", "resid_post.2"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def compat_python() -> Path:
    """The interpreter of .venv-compat, which is made and filled if it is not there."""
    python = ROOT / ".venv-compat" / "bin" / "python"
    if not (python.parent / "installed").exists():
        torch_pin = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        for package in (torch_pin, SAELENS):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
        (python.parent / "installed").touch()
    return python


def make_runs(folder: Path) -> Path:
    """Short runs of every architecture, as an SAE, a transcoder and a skip transcoder."""
    cache, runs = folder / "cache.zarr", folder / "runs"
    _run("harvest", "--model", "tiny", "--layers", f"{INPUT},{TARGET}", "--tokens", "40k", "--out", str(cache))
    grid = ["--cache", str(cache), "--out", str(runs), "--hook", INPUT, "--arch", ",".join(available("architectures"))]
    short = ["--k", "6", "--d-sae", "256", "--tokens", "100k", "--batch-size", "512", "--lr", "1e-3"]
    for more in ([], ["--target-hook", TARGET], ["--target-hook", TARGET, "--skip"]):
        _run("train", *grid, *short, "--masked-fraction", "0.5", *more)
    return runs


def _run(room: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", room, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def compare(run: Path, python: Path, folder: Path) -> tuple[float, float]:
    """Largest difference of features and of what is made of them, relative to the largest value."""
    trained = load_run(run)
    cache = ActivationCache.open(trained.facts["cache"]["path"])
    hook = cache.hook(trained.facts["cache"]["hook"])
    stored = cache.activations(hook.name, "clean", cache.held_out_shards[0])[:N_ROWS]
    x = torch.from_numpy(stored.astype("float32")) * hook.scale_factor
    save_file({"x": x}, folder / "rows.safetensors")
    reader = str(ROOT / "benchmarks" / "saelens_reader.py")
    arguments = [str(run), str(folder / "rows.safetensors"), str(folder / "theirs.safetensors")]
    subprocess.run([str(python), reader, *arguments], check=True, stderr=subprocess.DEVNULL)
    theirs = load_file(folder / "theirs.safetensors")
    with torch.no_grad():
        features, made = trained.sae.encode(x), trained.sae(x)
    assert features.count_nonzero() > 0
    return relative(features, theirs["features"]), relative(made, theirs["made"])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


@app.command()
def main(
    runs: Annotated[Path | None, typer.Option(help="folder of runs; default: short ones of everything")] = None,
    python: Annotated[Path | None, typer.Option(help="an interpreter with SAELens; default: .venv-compat's")] = None,
) -> None:
    """Compare encode and the whole forward pass of every run with SAELens's, on held-out rows of the run's cache."""
    with tempfile.TemporaryDirectory() as folder:
        runs = runs or make_runs(Path(folder))
        folders = sorted(path.parent for path in runs.glob("*/cfg.json"))
        if not folders:
            raise UserError(f"{runs} holds no complete runs; make some with `make demo`, or leave --runs out")
        python = python or compat_python()
        worst = 0.0
        print(f"{'run':<64}{'SAELens calls it':<26}{'encode':>9}{'forward':>9}   (largest relative difference)")
        for run in folders:
            architecture = json.loads((run / "cfg.json").read_text())["architecture"]
            if architecture not in THEIRS:
                print(f"{run.name:<64}{'(has none like it)':<26}")
                continue
            encode, forward = compare(run, python, Path(folder))
            worst = max(worst, encode, forward)
            print(f"{run.name:<64}{architecture:<26}{encode:>9.1e}{forward:>9.1e}")
    if worst > TOLERANCE:
        raise UserError(f"SAELens differs from granary by {worst:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    run_command(app)
