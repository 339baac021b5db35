"""Does SAELens see the SAE that we trained? Every run under --runs, on real rows of its cache.

SAELens cannot share our environment, so it gets one of its own, .venv-compat, made on the first call.

    python -m benchmarks.saelens_compat [--runs demo/runs]
"""

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
from train.run_folder import load_run

ROOT = Path(__file__).parent.parent
SAELENS = "sae-lens==6.54.12"
N_ROWS = 4096
TOLERANCE = 1e-5  # of the largest value in the tensor
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


def compare(run: Path, python: Path, folder: Path) -> tuple[float, float]:
    """Largest difference of features and of reconstructions, relative to the largest value."""
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
        features = trained.sae.encode(x)
        decoded = trained.sae.decode(features)
    assert features.count_nonzero() > 0
    return relative(features, theirs["features"]), relative(decoded, theirs["decoded"])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


@app.command()
def main(runs: Annotated[Path, typer.Option(help="folder of runs")] = Path("demo/runs")) -> None:
    """Compare encode and decode of every run with SAELens's, on held-out rows of the run's cache."""
    folders = sorted(path.parent for path in runs.glob("*/run.json"))
    if not folders:
        raise UserError(f"{runs} holds no runs; make some with `make demo`, or name a folder with --runs")
    python = compat_python()
    worst = 0.0
    print(f"{'run':<56}{'encode':>10}{'decode':>10}   (largest relative difference to {SAELENS})")
    with tempfile.TemporaryDirectory() as folder:
        for run in folders:
            encode, decode = compare(run, python, Path(folder))
            worst = max(worst, encode, decode)
            print(f"{run.name:<56}{encode:>10.1e}{decode:>10.1e}")
    if worst > TOLERANCE:
        raise UserError(f"SAELens differs from granary by {worst:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    run_command(app)
