"""Strikes one stage with faults and prints, one JSON line each, what came of them. A program, so that it may fork.

python tests/faults/program.py FOLDER STAGE moment=20 call=20 ...; under `unshare -rm` it also has disks of its own.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from child import FULL, after, failing_at, jumping_clock, killed_at, killed_when
from promises import Trials, killed, names_of, prepare, refused, stopped, unharmed, until
from stages import Stage, Wrong, make_stage

import evaluate.bench
from cache_spec import UserError
from cache_spec.layout import RECORDS, UPLOADS

DISK_BYTES = 100_000_000
FAULTS: dict[str, Callable[[Trials, float, int], None]] = {}


def fault(name: str) -> Callable:
    """The fault of that name."""

    def register(function: Callable) -> Callable:
        FAULTS[name] = function
        return function

    return register


@fault("kill -9 at a random moment")
def _moment(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.strike(lambda counter: None, killed, after(trials.rng.uniform(0, seconds), signal.SIGKILL))


@fault("kill -9 at a random system call")
def _call(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.strike(killed_at(trials.rng.randrange(n_calls)), killed)


@fault("kill -9 of one of two")
def _one_of_two(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.strike_one_of_two(trials.rng.uniform(0, seconds))


@fault("kill -9 at a random request to the store")
def _request(trials: Trials, seconds: float, n_calls: int) -> None:
    number = trials.rng.randrange(trials.stage.n_requests)
    trials.strike(killed_when(lambda n, name, key: n >= number), killed)


_UPLOAD = re.compile(rf"{UPLOADS}/\d+[/.]")  # of a shard; what is put there before the planning is none
COMMIT = {  # the request to the store that comes after each step
    "the uploads": lambda name, key: name == "create" and _UPLOAD.match(key),
    "the choice of a writer": lambda name, key: name == "read" and _UPLOAD.match(key),
    "a copy": lambda name, key: name == "copy",
    "the copies": lambda name, key: name == "create" and key.startswith(RECORDS),
    "the record": lambda name, key: name == "delete" and _UPLOAD.match(key),
}


@fault("kill -9 between the steps of a commit to the store")
def _step(trials: Trials, seconds: float, n_calls: int) -> None:
    comes = COMMIT[list(COMMIT)[trials.n_done % len(COMMIT)]]
    left = [trials.rng.randrange(2)]  # of the first shard or of the second, if both are missing

    def is_time(n: int, name: str, key: str) -> bool:
        left[0] -= bool(comes(name, key))
        return left[0] < 0

    trials.strike(killed_when(is_time), killed)


def _signal(number: int, trials: Trials, seconds: float, n_calls: int) -> None:
    if trials.rng.random() < 0.5:
        trials.strike(killed_at(trials.rng.randrange(n_calls), number), stopped)
    else:
        trials.strike(lambda counter: counter.note("struck"), stopped, after(trials.rng.uniform(0, seconds), number))


FAULTS["SIGINT"] = partial(_signal, signal.SIGINT)
FAULTS["SIGTERM"] = partial(_signal, signal.SIGTERM)


@fault("EIO")
def _eio(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.strike(failing_at(trials.rng.randrange(n_calls), errno.EIO), refused)


@fault("ENOSPC")
def _enospc(trials: Trials, seconds: float, n_calls: int) -> None:
    number, names = FULL
    trials.strike(failing_at(trials.rng.randrange(n_calls), number, names, for_good=True), refused)


@fault("read-only")
def _read_only(trials: Trials, seconds: float, n_calls: int) -> None:
    number = trials.rng.choice((errno.EACCES, errno.EROFS))
    names = ("open", "mkdir", "link", "replace")
    trials.strike(failing_at(trials.rng.randrange(n_calls), number, names, for_good=True), refused)


@fault("clock jumps")
def _clock(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.strike(jumping_clock(trials.rng.randrange(10**6)), unharmed)


@fault("two at once")
def _together(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.strike_together(trials.rng.uniform(0, seconds))


@fault("a disk that fills up")
def _full_disk(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.out()
    disk = trials.folder
    n_bytes = sum(path.stat().st_size for path in trials.stage.whole.rglob("*") if path.is_file())
    resize(disk, used(disk) + int(n_bytes * trials.rng.uniform(0, 1)))
    trials.strike(lambda counter: counter.note("struck"), refused, undo=lambda: resize(disk, DISK_BYTES))
    trials.mend()


@fault("/dev/shm full")
def _shared_memory(trials: Trials, seconds: float, n_calls: int) -> None:
    trials.strike(lambda counter: counter.note("struck"), unharmed)


@fault("the cache is deleted meanwhile")
def _deleted(trials: Trials, seconds: float, n_calls: int) -> None:
    cache, kept = trials.stage.inputs / "cache", trials.stage.inputs / "kept"
    if not kept.exists():
        shutil.copytree(cache, kept)

    def undo() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(kept, cache)

    delete = after(trials.rng.uniform(0, seconds), 0, lambda: shutil.rmtree(cache))
    trials.strike(lambda counter: counter.note("struck"), refused, delete, undo)
    trials.mend()


def mount_for(fault: str, folder: Path) -> Path:
    """Where the trials of a fault are: on a small disk of their own, if they fill it."""
    if fault == "/dev/shm full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", "/dev/shm"], check=True)
        Path("/dev/shm/full").write_bytes(bytes(4096))
    if fault != "a disk that fills up":
        return folder
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)
    return disk


def resize(disk: Path, n_bytes: int) -> None:
    """Make the disk larger or smaller, but never smaller than what is on it."""
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", str(disk)], check=True)


def used(disk: Path) -> int:
    """Bytes that are taken."""
    whole = os.statvfs(disk)
    return (whole.f_blocks - whole.f_bfree) * whole.f_frsize


def unreachable(name: str, **options: object) -> None:
    """In place of a look for a model on the hub."""
    raise UserError(f"'{name}' cannot be had")


def main(folder: Path, name: str, faults: dict[str, int]) -> None:
    torch.set_num_threads(1)
    evaluate.bench.load_model = unreachable  # pyright: ignore[reportAttributeAccessIssue]
    stage: Stage = make_stage(name, folder / f"inputs_{name}")
    seconds, n_calls = prepare(stage, folder)
    for wanted, n in faults.items():
        trials = Trials(wanted, stage, mount_for(wanted, folder), n)
        until(trials, partial(FAULTS[wanted], trials, seconds, n_calls))
        print(json.dumps({"fault": wanted, "stage": name, "outcomes": trials.outcomes}), flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], names_of(sys.argv[3:]))
    except Wrong as wrong:
        raise SystemExit(f"WRONG: {wrong}") from None
