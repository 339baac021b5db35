"""A contestant in a process of its own: python -P benchmarks/peers/worker.py JOB, run by an environment that has it.

It says hello, then answers each line on its standard input with one line of JSON: `steps N` with the seconds of one
step, the mean of N; `look` with how well it reconstructs by now. In between it sleeps, so that whoever is timed has
the machine alone. What a library prints goes to the standard error.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.peers.job import Contestant, Job


def serve(job: "Job", orders: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Make the contestant and follow the orders until they end."""
    from benchmarks.peers.job import Unsuitable, made_up_batches

    batches = made_up_batches(job)
    try:
        contestant = importlib.import_module(f"benchmarks.peers.{job.contestant}").build(job, batches[0])
    except Unsuitable as reason:
        answer({"unsuitable": str(reason)})
        return
    answer({"settings": contestant.settings, "versions": contestant.versions, **quality(contestant, batches[0])})
    n_done = 0
    for order in orders:
        word, *n = order.split()
        if word == "steps":
            answer(
                {"seconds": timed(job, contestant, [batches[(n_done + i) % len(batches)] for i in range(int(n[0]))])}
            )
            n_done += int(n[0])
        elif word == "look":
            answer(quality(contestant, batches[0]))
        else:
            raise AssertionError(order)


def timed(job: "Job", contestant: "Contestant", batches: "list[Tensor]") -> float:
    """Seconds of a step, the mean over these batches."""
    wait_for(job.device)
    start = time.perf_counter()
    for x in batches:
        contestant.step(x)
    wait_for(job.device)
    return (time.perf_counter() - start) / len(batches)


def wait_for(device: str) -> None:
    """A GPU works on while Python goes ahead."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def quality(contestant: "Contestant", x: "Tensor") -> dict[str, float]:
    """Share of the variance that is left, and active latents a row: shows whether the step trains at all."""
    import torch

    with torch.no_grad():
        codes, made = contestant.look(x)
        left = (x - made.float()).square().sum() / (x - x.mean(0)).square().sum()
        return {"fvu": left.item(), "l0": (codes > 0).sum().item() / len(x), "n_dead": contestant.n_dead()}


def main() -> None:
    """Answers go where standard output was; whatever else prints, prints to standard error."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: a library of the same name as a room wins
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from benchmarks.peers.job import Job

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    serve(Job(**json.loads(sys.argv[1])), sys.stdin, answer)


if __name__ == "__main__":
    main()
