"""Strikes one stage with faults and prints, one JSON line each, what came of them. A program, so that it may fork.

python tests/faults/program.py FOLDER STAGE moment=20 call=20 ...; under `unshare -rm` it also has disks of its own.
"""

import errno
import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from child import FULL, after, failing_at, jumping_clock, killed_at
from promises import Trials, killed, names_of, prepare, refused, stopped, unharmed, until
from stages import Stage, Wrong, make_stage

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


def main(folder: Path, name: str, faults: dict[str, int]) -> None:
    torch.set_num_threads(1)
    stage: Stage = make_stage(name, folder / f"inputs_{name}")
    seconds, n_calls = prepare(stage, folder)
    for wanted, n in faults.items():
        trials = Trials(wanted, stage, folder, n)
        until(trials, partial(FAULTS[wanted], trials, seconds, n_calls))
        print(json.dumps({"fault": wanted, "stage": name, "outcomes": trials.outcomes}), flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], names_of(sys.argv[3:]))
    except Wrong as wrong:
        raise SystemExit(f"WRONG: {wrong}") from None
