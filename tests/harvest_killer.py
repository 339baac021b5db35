"""Kills harvests at random moments and looks at what they leave. A program, so that it may fork.

python tests/harvest_killer.py FOLDER MODEL TEXT N_KILLS N_PROCESSES ... prints for each number of processes how often
kills met a cache in each state, or WRONG: and what did not hold.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from harvest_fixtures import request_for
from pipeline_fixtures import files_of

from cache_spec import ActivationCache, CacheError, CacheIncomplete, CacheNotFound, column_types, derive_seed
from harvest import run
from harvest.model import load_model
from harvest.share import Share


def start(harvest, out: Path, index: int, count: int) -> int:
    """A child process that harvests its share; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        harvest(out, Share(index=index, count=count, source="--shard" if count > 1 else ""))
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)


def finished(children: list[int]) -> bool:
    """Wait for all; whether each ended by itself and well."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return not any(codes)


def state_of(out: Path, whole: ActivationCache) -> str:
    """What a reader sees; raises AssertionError if it is anything but shards of the whole cache."""
    try:
        cache, state = ActivationCache.open(out), "whole"
    except CacheNotFound:
        return "planning"
    except CacheIncomplete:
        try:
            cache, state = ActivationCache.open(out, allow_partial=True), "some shards"
        except CacheIncomplete:
            return "planning"
    assert state != "whole" or len(cache.shards) == whole.plan.n_shards, "opened as whole"
    for shard in cache.shards:
        for hook in whole.plan.hooks:
            for variant in whole.plan.variants:
                rows, wanted = (c.activations(hook.name, variant.name, shard) for c in (cache, whole))
                assert rows.tobytes() == wanted.tobytes(), f"rows of shard {shard}"
        for name in column_types(whole.plan):
            assert cache.column(name, shard).tobytes() == whole.column(name, shard).tobytes(), f"{name} of {shard}"
    return state if cache.shards else "no shard"


def main(folder: Path, model: str, text: Path, n_kills: int, crews: list[int]) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # a killed process loses nothing that the system has taken
    loaded = load_model(model)
    request = request_for(loaded, text)

    def harvest(out: Path, share: Share) -> None:
        run.harvest(loaded, request, out, share=share)

    assert finished([start(harvest, folder / "whole", 0, 1)]), "a harvest alone failed"
    for n_processes in crews:
        (folder / str(n_processes)).mkdir()
        seen, kills = kill_crews(harvest, folder / str(n_processes), folder / "whole", n_processes, n_kills)
        print(f"{kills} kills of {n_processes}", dict(seen), flush=True)  # before the next fork


def kill_crews(harvest, folder: Path, whole_path: Path, n_processes: int, n_kills: int) -> tuple[Counter, int]:
    """Kill that many harvests of one cache, again and again, and look at what they leave: states seen, and kills."""
    rng = random.Random(derive_seed("tests/kill", n_processes))
    begin = time.monotonic()  # as many at once as are killed: beside each other they take longer
    assert finished([start(harvest, folder / "timed", i, n_processes) for i in range(n_processes)]), "unkilled, failed"
    seconds = time.monotonic() - begin
    whole, seen, kills, attempt = ActivationCache.open(whole_path), Counter(), 0, 0
    while kills < n_kills:
        out, attempt = folder / str(attempt), attempt + 1
        while kills < n_kills and (not out.exists() or state_of(out, whole) != "whole"):
            children = [start(harvest, out, i, n_processes) for i in range(n_processes)]
            for child in rng.sample(children, n_processes):  # one after another, each at a moment of its own
                time.sleep(rng.random() * seconds / n_processes)
                seen[state_of(out, whole)] += 1  # beside living writers
                os.kill(child, signal.SIGKILL)
            kills += not finished(children)
            seen[state_of(out, whole)] += 1
        assert finished([start(harvest, out, i, n_processes + 1) for i in range(n_processes + 1)]), "does not go on"
        assert state_of(out, whole) == "whole", "not whole after all"
        left, wanted = files_of(out), files_of(whole_path)
        assert left.keys() == wanted.keys(), left.keys() ^ wanted.keys()
        assert not (unlike := [name for name in wanted if left[name] != wanted[name]]), unlike
    return seen, kills


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), [int(n) for n in sys.argv[5:]])
    except (AssertionError, CacheError) as fault:
        raise SystemExit(f"WRONG: {fault}") from fault
