"""Harvests of which some are killed, start late or fall asleep, each as if on a machine of its own. A program, so that
it may fork.

python tests/harvest_joiner.py FOLDER MODEL TEXT prints a line for each thing that was tried, and WRONG: and why at the
first that did not hold.
"""

import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from harvest_fixtures import request_for
from harvest_killer import finished
from pipeline_fixtures import files_of

from cache_spec import CacheError, verify_cache
from cache_spec.layout import CLAIMS, RECORDS
from harvest import claims, run, target
from harvest.model import LoadedModel, load_model
from harvest.request import Request
from harvest.share import CLAIM, Share, read_share

TIMEOUT_S = 2.0


class Crew:
    """Starts processes that harvest one cache and note what they made."""

    def __init__(self, loaded: LoadedModel, request: Request, out: Path, machines: bool) -> None:
        self._loaded, self._request, self.out, self.machines = loaded, request, out, machines
        self._log = out.parent / f"{out.name}.log"

    def start(self, share: Share, batch_windows: int = 0, slow: float = 0.1) -> int:
        """A child process; each of its shards takes `slow` seconds more to write."""
        child = os.fork()
        if child:
            return child
        real = target.write_shard

        def write(path: Path, plan, shard: int, *arrays, **how) -> dict:
            time.sleep(slow)
            record = real(path, plan, shard, *arrays, **how)
            with self._log.open("a") as log:
                log.write(f"{os.getpid()} {shard}\n")
            return record

        target.write_shard = write  # pyright: ignore[reportAttributeAccessIssue]
        if self.machines:  # then only beats tell whether it lives
            name = f"machine {os.getpid()}"
            claims.this_machine = lambda: name
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            request, timeout = self._request, TIMEOUT_S
            run.harvest(
                self._loaded, request, self.out, share=share, batch_windows=batch_windows, claim_timeout=timeout
            )
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)

    def made(self) -> dict[int, list[int]]:
        """The shards that each process has written, in order."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        made: dict[int, list[int]] = {}
        for child, shard in (map(int, line.split()) for line in lines):
            made.setdefault(child, []).append(shard)
        return made

    def wait_for(self, what: str, child: int) -> None:
        """Until the process has claimed a shard, or has committed one."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            held = b""
            for path in (self.out / CLAIMS).glob("0*"):
                with suppress(FileNotFoundError):  # given back meanwhile
                    held += path.read_bytes()
            if (what == "a claim" and b"process %d" % child in held) or (what == "a shard" and child in self.made()):
                return
            time.sleep(0.005)
        raise AssertionError(f"process {child} never had {what}")


def shares(how: str, n: int) -> list[Share]:
    """The shares of n processes that a launcher, a person or nobody has cut."""
    if how == CLAIM:
        return [read_share(CLAIM, {})] * n
    cut = {"by hand": lambda i: (f"{i}/{n}", {}), "ranks": lambda i: ("", {"RANK": str(i), "WORLD_SIZE": str(n)})}
    return [read_share(*cut[how](i)) for i in range(n)]


def check(crew: Crew, wanted: dict[str, bytes]) -> None:
    left = files_of(crew.out)
    assert left.keys() == wanted.keys(), f"files {left.keys() ^ wanted.keys()}"
    assert not (unlike := [name for name in wanted if left[name] != wanted[name]]), f"other bytes in {unlike}"


def kill_one_of_three(crew: Crew, how: str, wanted: dict[str, bytes]) -> None:
    children = [crew.start(share) for share in shares(how, 3)]
    crew.wait_for("a claim", children[1])
    os.kill(children[1], signal.SIGKILL)
    assert not finished(children[1:2])
    assert finished([children[0], children[2]]), "a process that was not killed failed"
    check(crew, wanted)
    twice = Counter(shard for made in crew.made().values() for shard in made)
    assert crew.machines or max(twice.values()) == 1, f"made twice: {twice}"  # by beats, one that is slow is dead


def join_late(crew: Crew, how: str, wanted: dict[str, bytes]) -> None:
    first = crew.start(Share(), slow=1.0)
    crew.wait_for("a shard", first)
    late = [crew.start(share) for share in shares(how, 2)]
    assert finished([first, *late])
    check(crew, wanted)
    made = crew.made()
    assert first in made, "the first made nothing"
    assert set(late) & set(made), "who came late made nothing"


def sleep_and_wake(crew: Crew, others: int) -> None:
    """Its shards are made by another with other batches, so with other bytes; then it goes on with its own."""
    asleep = crew.start(Share(), batch_windows=1, slow=1.0)
    crew.wait_for("a claim", asleep)
    os.kill(asleep, signal.SIGSTOP)
    awake = crew.start(Share(), batch_windows=others)
    assert finished([awake])
    there = files_of(crew.out)
    assert len(crew.made()[awake]) == 6, "not all was made while one slept"
    os.kill(asleep, signal.SIGCONT)
    assert finished([asleep]), "who woke up failed"
    assert asleep in crew.made(), "who woke up had nothing in hand"
    check(crew, there)
    assert not list(verify_cache(crew.out))


def main(folder: Path, model: str, text: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda fd: None
    loaded = load_model(model)
    request = request_for(loaded, text)
    whole = Crew(loaded, request, folder / "whole", machines=False)
    assert finished([whole.start(Share(), slow=0.0)])
    wanted = files_of(whole.out)
    assert len(list((whole.out / RECORDS).iterdir())) == 6
    assert not (whole.out / CLAIMS).exists()
    for how in (CLAIM, "ranks", "by hand"):
        for machines in (False, True):
            kill_one_of_three(Crew(loaded, request, folder / f"killed {how} {machines}", machines), how, wanted)
            print(f"one of three killed, {how}, {'by beats' if machines else 'on one machine'}", flush=True)
    for how in (CLAIM, "ranks"):
        join_late(Crew(loaded, request, folder / f"late {how}", machines=True), how, wanted)
        print(f"two came late, {how}", flush=True)
    sleep_and_wake(Crew(loaded, request, folder / "asleep", machines=True), 7)
    print("one slept while its shard was made by another", flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    except (AssertionError, CacheError) as fault:
        raise SystemExit(f"WRONG: {fault}") from fault
