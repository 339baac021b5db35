"""Strikes each stage from outside at random moments; two files of tests call this, so that two cores share them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROGRAM = Path(__file__).parent / "program.py"
STAGES = ("harvest", "train", "evaluate", "export")
OTHERS = {  # how many of each in CI
    "SIGINT": 3,
    "SIGTERM": 3,
    "EIO": 4,
    "ENOSPC": 3,
    "read-only": 3,
    "clock jumps": 1,
    "two at once": 2,
}
MOUNTED = {"a disk that fills up": 3, "/dev/shm full": 1}  # on a disk of their own; the last, for it stays full


def may_mount() -> bool:
    """Whether this machine lets a user have disks of his own."""
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(mount, capture_output=True).returncode == 0


def keeps_its_promises(stage: str, n_kills: int, tally: Callable, folder: Path) -> None:
    """A starting process takes seconds, so a program imports everything once and forks the ones that are struck."""
    each, alone = n_kills // len(STAGES), may_mount()
    wanted = {"kill -9 at a random moment": each // 2, "kill -9 at a random system call": each - each // 2}
    others = OTHERS | ({"the cache is deleted meanwhile": 3} if stage == "train" else {}) | (MOUNTED if alone else {})
    wanted |= {fault: max(n, each // 10) for fault, n in others.items()}
    strike(stage, wanted, tally, folder, alone=alone)


def strike(stage: str, wanted: dict[str, int], tally: Callable, folder: Path, *, alone: bool = False, **more: str):
    """So many of each fault, which are counted; `more`: variables of the environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
    command = [sys.executable, PROGRAM, folder, stage, *(f"{fault}={n}" for fault, n in wanted.items())]
    command = ["unshare", "-rm", *command] if alone else command
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for one in made:
        assert sum(one["outcomes"].values()) >= wanted[one["fault"]]
        tally(one["fault"], stage, one["outcomes"])
    assert [one["fault"] for one in made] == list(wanted)
