"""The ranks of a job, started from one process that has everything imported, as torchrun would start them."""

import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

_SECONDS = 120
PARALLEL = ("data", "latents")


@functools.cache
def _server() -> Any:
    """It has imported what a rank needs, also what torch imports at its first step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "torch._dynamo", "torch.distributed.tensor", "train.sweep", "parallel_fixtures", "train_fixtures"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else it finds nothing of this folder, and says nothing
        forkserver.ensure_running()
    return context


def ranks(
    function: Callable[..., None],
    n: int,
    parallel: str,
    folder: Path,
    *arguments: Any,
    environs: Sequence[Mapping[str, str]] = (),
) -> list[int | None]:
    """Call `function(team, *arguments)` on `n` ranks; gives their exit codes. What they print is in rank_<i>.log.
    `environs` has more of the environment of each, if there is more; TEST_HOST is the name of its machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [where | {"RANK": str(rank), **(environs[rank] if environs else {})} for rank in range(n)]
    processes = [
        _server().Process(target=_rank, args=(function, environ, parallel, folder, arguments), daemon=True)
        for environ in each
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    return codes


def _rank(function: Any, environ: dict[str, str], parallel: str, folder: Path, arguments: Any) -> None:
    from cache_spec.command import run_command
    from train.ranks import joined, read_rank

    with (folder / f"rank_{environ['RANK']}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(environ)
    if "TEST_HOST" in environ:
        socket.gethostname = lambda: environ["TEST_HOST"]

    def work() -> None:
        with joined(read_rank(environ), parallel=parallel, device="cpu") as team:
            function(team, *arguments)

    run_command(work)


def logs(folder: Path) -> str:
    """What all ranks printed."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("rank_*.log")))
