"""Several processes that do one thing together, started from one that has everything imported."""

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.parallel.axis import ALONE, Axis, Spread

_SECONDS = 120


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "train.sweep", "train_fixtures"])
    return context


def together(function: Callable[..., None], n: int, folder: Path, *arguments: Any) -> list[int]:
    """Call `function(rank, n, *arguments)` in `n` processes of one group (gloo); gives their exit codes."""
    meet = folder / f"meet-{function.__name__}-{n}"
    processes = [
        _server().Process(target=_member, args=(function, rank, n, str(meet), arguments), daemon=True)
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    codes = [-1 if process.exitcode is None else process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    meet.unlink(missing_ok=True)
    return codes


def _member(function: Callable[..., None], rank: int, n: int, meet: str, arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=n)
    try:
        function(rank, n, *arguments)
    finally:
        dist.destroy_process_group()


def spread_over(mode: str, rank: int, n: int) -> Spread:
    """The processes of the group, as `--parallel data` or `latents` has them; "alone" for one that is alone."""
    if mode == "alone":
        return ALONE
    axis = Axis(n, rank, torch.distributed.group.WORLD)
    return Spread(rows=axis, all=axis) if mode == "data" else Spread(latents=axis, all=axis)
