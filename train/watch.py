"""How the ranks of a job notice that one of them is gone: by its word, by its process, or by its silence.

A rank that ends in good order says so in the job's store. One that was killed says nothing: on its own machine its
process is gone, and on others its heartbeat stands still. No clocks are compared, only what a watcher sees change.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cache_spec.errors import UserError
from train.run_folder import GO_ON

if TYPE_CHECKING:
    import torch.distributed as dist

SILENT_SECONDS = 30.0  # of a rank on another machine, until it counts as gone
GRACE_SECONDS = 20.0  # for this process to end by itself when another is gone
_EVERY_SECONDS = 0.5
_LOOKED_SECONDS = 5.0  # for an answer of the store, in the end
_ENDS = "ends"
_DEAD = "died without a word: it was killed, by hand or for want of memory"
INTERRUPTED = "was stopped by Ctrl-C or a signal"


class JobEnded(UserError):
    """Another rank is gone, and so the job ends here too."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of a job, by its number among all and among those on its machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.index} (host {self.host}, pid {self.pid})"


class Watch:
    """Watches the other ranks in a thread of its own while it is entered.

    When one is gone, `reason` says which and why, and the main thread gets a KeyboardInterrupt. If that does not end
    the process, which a collective on a GPU can prevent, the thread does, with the same sentence.
    """

    def __init__(
        self,
        store: "dist.TCPStore | dist.PrefixStore",
        rank: Rank,
        members: Sequence[Rank],
        *,
        interrupted: threading.Event,
        keeps: bool,
    ) -> None:
        """`interrupted` is set when a signal came (interrupted_once); with `keeps`, the process may then take its time
        to write checkpoints."""
        self.reason: str | None = None
        self.advice: Callable[[], str] = lambda: GO_ON
        """What to do about it; called when it has happened."""
        self._store, self._rank, self._interrupted, self._keeps = store, rank, interrupted, keeps
        self._lock = threading.Lock()
        self._others = [other for other in members if other != rank]
        self._lost: int | None = None  # who died, if that is the reason
        self._seen = {other.index: ("", time.monotonic()) for other in self._others}
        self._n_beats = 0
        self._over = threading.Event()
        self._left = threading.Event()
        self._answered = time.monotonic()  # when the store last did
        self._mute = False  # whether it no longer does
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._looker = threading.Thread(target=self._look_on, name="look", daemon=True)

    def __enter__(self) -> "Watch":
        self._answered = time.monotonic()
        self._thread.start()
        # A machine that is switched off breaks no connection, and whoever asks its store may wait for a quarter of an
        # hour: so the thread that asks is not the one that acts.
        self._looker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._left.set()
        self._thread.join()
        if not self._mute:  # one that is asking the store when Python ends would end it by SIGABRT
            self._looker.join(_LOOKED_SECONDS)

    @property
    def sentence(self) -> str:
        """Why the job ended, the last whole checkpoint, and how to go on."""
        return f"{self.reason}; {self.advice()}"

    @property
    def speaks(self) -> bool:
        """Whether it is for this rank to say why: the first does, and where that one died, the first on each host."""
        if self._lost != 0:
            return self._rank.index == 0
        return not any(each.host == self._rank.host and 0 < each.index < self._rank.index for each in self._others)

    def tell(self, how: str) -> None:
        """Let the others know how this rank ended, "" for well; only the first word counts, and after it the watch is
        over. If another is the reason, the others hear of that one."""
        if self._over.is_set():
            return
        self._over.set()
        if self._mute:
            return
        word = {"rank": self._rank.index, "how": how, "reason": self.reason, "lost": self._lost}
        # Without its store a job ends by itself, one rank after the other.
        with suppress(RuntimeError):
            self._store.append(_ENDS, json.dumps(word) + "\n")

    def told(self) -> dict[int, dict[str, Any]]:
        """The words of the ranks that have ended in good order. Raises RuntimeError if the store is gone."""
        if not self._store.check([_ENDS]):
            return {}
        words = map(json.loads, self._store.get(_ENDS).decode().splitlines())
        return {word["rank"]: word for word in words}

    def check(self) -> None:
        """Raises JobEnded if a rank is gone; for whoever waits for others."""
        if self.reason is not None:
            raise JobEnded(self.sentence)

    def look(self) -> bool:
        """Set `reason` if a rank is gone; says whether one is. Ranks that ended well are none of these."""
        if self.reason is None:
            with self._lock:
                self.reason = self.reason or self._find_reason()
        return self.reason is not None

    def _find_reason(self) -> str | None:
        try:
            quiet = self._quiet()
            told = self.told()  # after that: a process says how it ended before it is gone
        except RuntimeError:
            self._lost = 0  # so each host speaks for itself
            dead = next((other for other in self._others if self._is_dead(other)), None)
            return (
                f"{dead} {_DEAD}" if dead else f"the store of the job at {address()} is gone, with rank 0 or torchrun"
            )
        for other in self._others:
            word = told.get(other.index)
            if word is None:
                if other.index in quiet:
                    self._lost = other.index
                    return f"{other} {quiet[other.index]}"
            elif word["reason"] is not None:
                self._lost = word["lost"]
                return word["reason"]
            elif word["how"] and not (word["how"] == INTERRUPTED and self._interrupted.is_set()):
                return f"{other} {word['how']}"  # unless the same signal came to both
        return None

    def wait_for_reason(self, seconds: float = SILENT_SECONDS + 5) -> bool:
        """Return when a rank is found to be gone; says whether one was."""
        last = time.monotonic() + seconds
        while not self.look() and time.monotonic() < last:
            time.sleep(_EVERY_SECONDS)
        return self.reason is not None

    def leave(self) -> None:
        """The last that this rank asks of the store: whoever keeps it may go."""
        if not self._mute:
            with suppress(RuntimeError):
                self._store.set(f"left/{self._rank.index}", "")

    def wait_for_others(self) -> None:
        """Return when all others have left or died: the store goes with the process that keeps it."""
        indices = {other.index for other in self._others}
        with suppress(RuntimeError):
            while not indices <= {i for i in indices if self._store.check([f"left/{i}"])} | self._quiet().keys():
                time.sleep(_EVERY_SECONDS / 10)

    def _quiet(self) -> dict[int, str]:
        """The ranks without a sign of life, and what that sign would have been."""
        self._n_beats += 1
        self._store.set(f"beat/{self._rank.index}", str(self._n_beats))
        keys = [f"beat/{other.index}" for other in self._others]
        beats = self._store.multi_get(keys) if self._store.check(keys) else [b""] * len(keys)
        quiet, now = {}, time.monotonic()
        for other, beat in zip(self._others, map(bytes.decode, beats), strict=True):
            last, since = self._seen[other.index]
            if beat != last:
                self._seen[other.index] = (beat, now)
            elif now - since > SILENT_SECONDS:
                quiet[other.index] = f"gave no sign of life for {SILENT_SECONDS:.0f} s"
            if self._is_dead(other):
                quiet[other.index] = _DEAD
        return quiet

    def _is_dead(self, other: Rank) -> bool:
        return other.host == self._rank.host and not _is_running(other.pid)

    def _look_on(self) -> None:
        while not self._over.wait(_EVERY_SECONDS) and not self.look():
            self._answered = time.monotonic()

    def _run(self) -> None:
        while self.reason is None and not self._over.wait(_EVERY_SECONDS / 5):
            if time.monotonic() - self._answered > SILENT_SECONDS:
                self._mute, self._lost = True, 0
                self.reason = f"the store of the job at {address()} does not answer: rank 0's machine is gone"
        if self.reason is None or self._over.is_set():
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        done = self._interrupted if self._keeps else self._left
        if not done.wait(GRACE_SECONDS):
            if self.speaks:
                print(f"error: {self.sentence}", file=sys.stderr, flush=True)
            os._exit(JobEnded.exit_code)


def _is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and is not yet counted by its parent is none."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")  # on Linux
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (ProcessLookupError, FileNotFoundError):
        return False


def address() -> str:
    """Where the ranks of this job meet."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


@contextmanager
def interrupted_once() -> Iterator[threading.Event]:
    """Inside, the first SIGINT or SIGTERM raises KeyboardInterrupt and sets the event; all later ones do nothing.

    One Ctrl-C comes twice to a process that torchrun started: from the terminal, and handed on by torchrun, which
    ends by force what has not ended after 30 s.
    """
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
