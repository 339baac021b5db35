"""From `git clone` to the report: minutes for installation and for the job, and the peak memory of any one process.

python -m benchmarks.demo [--size full|small]
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from cache_spec.command import run_command
from cache_spec.errors import UserError

ROOT = Path(__file__).parent.parent
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def timed(command: list[str], cwd: Path) -> tuple[float, float]:
    """Run a command. Returns its seconds and the largest peak memory of any process so far, in GiB."""
    start = time.monotonic()
    if subprocess.run(command, cwd=cwd).returncode:
        raise UserError(f"'{' '.join(command)}' failed; its own words are above")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.monotonic() - start, peak / (2**30 if sys.platform == "darwin" else 2**20)


@app.command()
def main(size: Annotated[str, typer.Option(help="full, or small for a smoke test")] = "full") -> None:
    """Clone this checkout's last commit into a fresh folder and time what a newcomer would type."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "granary"
        for name, command, cwd in (
            ("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT),
            ("make setup", ["make", "setup"], clone),
            ("make demo", ["make", "demo", f"DEMO_SIZE={size}"], clone),
        ):
            rows.append((name, *timed(command, cwd)))
    print(f"\n{'step':<12}{'minutes':>9}{'peak GiB':>10}")
    for name, seconds, peak in rows:
        print(f"{name:<12}{seconds / 60:>9.2f}{peak:>10.2f}")
    print(f"{'together':<12}{sum(row[1] for row in rows) / 60:>9.2f}")


if __name__ == "__main__":
    run_command(app)
