"""What strikes a command from outside at a random moment: kill -9, signals, a disk that fails, is full or read-only,
another time. Nothing committed is lost, nothing torn is accepted, and the command then goes on to the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cache_fixtures import scratch

PROGRAM = Path(__file__).parent / "program.py"
STAGES = ("harvest", "train", "evaluate", "export")
OTHERS = {"SIGINT": 4, "SIGTERM": 4, "EIO": 5, "ENOSPC": 4, "read-only": 4, "clock jumps": 2}  # of each, in CI


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_keeps_its_promises_whatever_strikes_it(stage, n_kills, tally):
    """A starting process takes seconds, so a program imports everything once and forks the ones that are struck."""
    each = n_kills // len(STAGES)
    wanted = {"kill -9 at a random moment": each // 2, "kill -9 at a random system call": each - each // 2}
    wanted |= {fault: max(n, each // 10) for fault, n in OTHERS.items()}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with scratch() as folder:
        command = [sys.executable, PROGRAM, folder, stage, *(f"{fault}={n}" for fault, n in wanted.items())]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for one in made:
        assert sum(one["outcomes"].values()) >= wanted[one["fault"]]
        tally(one["fault"], stage, one["outcomes"])
    assert [one["fault"] for one in made] == list(wanted)
