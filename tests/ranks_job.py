"""Jobs of several ranks, forked from one process that has imported torch: `python tests/ranks_job.py CACHE FOLDER`.

Prints one JSON object: of each job the exit codes and what each rank said, for tests/test_train_ranks_sweep.py.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
from train_fixtures import DATA, run_config, sweep_runs

from cache_spec import ActivationCache, CacheDamaged
from cache_spec.command import heed, run_command
from train import sharing, watch
from train.loader import MixedBatchLoader
from train.passes import needed_bytes
from train.ranks import joined, read_rank
from train.step import TrainRun
from train.sweep import Unfinished, failures_sentence, train_sweep

LIMIT_SECONDS = 60
EVERY = 7
JOB_DATA = replace(DATA, n_tokens=32 * 30)
RUNS = [run for run in sweep_runs() if run.name in ("batchtopk", "masked", "dropped", "rising")]
FAILING = [run_config("topk", name="failing", lr=1e30), run_config("topk")]
"""Each on a rank of its own, so the rank that reads is the one that has nothing left to train."""


def train(cache: Path, out: Path, *, resume: bool = False, passes: bool = False, failing: bool = False) -> None:
    """One rank of a sweep, as the command runs it. `passes`: there is memory for half of a rank's runs."""
    runs = FAILING if failing else RUNS
    with joined(read_rank(os.environ), parallel="", device="cpu") as team:
        loader = MixedBatchLoader(ActivationCache.open(cache), JOB_DATA, team=team)
        memory = 2 * needed_bytes(runs[:1], loader, 1) if passes else None
        facts = train_sweep(
            loader, runs, out=out, checkpoint_every=EVERY, resume=resume, memory=team.part_of(memory), team=team
        )
        assert [fact["name"] for fact in facts] == [run.name for run in runs]
        if sentence := failures_sentence(facts):
            raise Unfinished(sentence)


def job(
    n_ranks: int,
    body: Callable[[], None],
    folder: Path,
    *,
    n_nodes: int = 1,
    prepare: Callable[[int], None] = lambda index: None,
) -> dict[str, Any]:
    """Fork the ranks, wait for them, and tell how each ended and how long it took since the first did."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    each = n_ranks // n_nodes
    pids = [os.fork() or _rank(i, n_ranks, each, port, body, folder, prepare) for i in range(n_ranks)]
    codes: dict[int, int] = {}
    ended: list[float] = []
    began = time.monotonic()
    while len(codes) < n_ranks:
        for index, pid in enumerate(pids):
            if index not in codes and (found_pid := os.waitpid(pid, os.WNOHANG))[0]:
                codes[index] = os.waitstatus_to_exitcode(found_pid[1])
                ended.append(time.monotonic())
        if time.monotonic() - began > 3 * LIMIT_SECONDS:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    said = [(folder / f"{index}.err").read_text() for index in range(n_ranks)]
    return {"codes": [codes[i] for i in range(n_ranks)], "said": said, "pids": pids, "seconds": ended[-1] - ended[0]}


def _rank(
    index: int,
    count: int,
    on_node: int,
    port: int,
    body: Callable[[], None],
    folder: Path,
    prepare: Callable[[int], None],
) -> int:
    os.dup2(os.open(folder / f"{index}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ |= {
        "RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(index % on_node),
        "LOCAL_WORLD_SIZE": str(on_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    name = f"node{index // on_node}"
    socket.gethostname = lambda: name
    heed(signal.SIGINT, signal.SIGTERM)
    code = 1
    try:
        prepare(index)
        run_command(body)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def at_step(n: int, rank: int, act: Callable[[], None]) -> Callable[[int], None]:
    """Before its n-th step, whichever run's, this rank does something."""

    def prepare(index: int) -> None:
        left, step = [n], TrainRun.step

        def counted(self: TrainRun, *rows: Any, **how: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                act()
            return step(self, *rows, **how)

        if index == rank:
            TrainRun.step = counted

    return prepare


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    signal.raise_signal(signal.SIGTERM)


def damage(n: int) -> Callable[[int], None]:
    """The rank that reads finds damage when it comes to step n."""

    def prepare(index: int) -> None:
        fill = sharing.Ring.filling

        @contextmanager
        def failing(self: sharing.Ring, step: int) -> Iterator[None]:
            with fill(self, step):
                if step == n:
                    raise CacheDamaged("c/3/0 fails its checksum; delete its record and run the same harvest")
                yield

        sharing.Ring.filling = failing

    return prepare


def far_away(index: int) -> None:
    """A rank on another machine is killed; only its silence tells."""
    watch.SILENT_SECONDS = 3.0
    at_step(40, 1, kill)(index)


def main(cache: Path, root: Path) -> dict[str, Any]:
    """Every job, by name; their runs are in folders of these names."""
    torch.set_num_threads(1)
    jobs: dict[str, Any] = {}

    def run(name: str, n_ranks: int, *, out: str = "", how: dict[str, bool] | None = None, **changes: Any) -> None:
        jobs[name] = job(
            n_ranks, lambda: train(cache, root / (out or name), **(how or {})), root / "said" / name, **changes
        )

    train(cache, root / "one")  # here, so that what torch imports for its first step is there for all
    run("two", 2)
    run("two nodes", 4, n_nodes=2)
    run("passes", 2, how={"passes": True})
    run("killed", 4, prepare=at_step(16, 2, kill))
    run("first killed", 2, out="killed", how={"resume": True}, prepare=at_step(10, 0, kill))
    run("gone on", 1, out="killed", how={"resume": True})
    run("far away", 2, n_nodes=2, prepare=far_away)
    run("interrupted", 2, prepare=at_step(20, 1, interrupt))
    run("damaged", 2, prepare=damage(20))
    run("failing", 2, how={"failing": True})
    run("held", 2, out="two")
    return jobs


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
