"""Claims: who is making which shard, so that processes that share a cache do not make one twice.

A claim is a note that one process alone can post, and that changes every few seconds while its owner lives. Others
look at it, and hold its owner for dead if it stays the same for long enough on their own clock; no time of another
machine is ever read. A claim that is taken over gets the next number, again posted by one process alone.

All this is advice. Shards are pure functions of the plan and are committed once, so two makers of one shard, say
because the first was only asleep, are a waste of time and nothing else.
"""

import json
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cache_spec.errors import UserError
from harvest.claim_board import CLAIM_NAME, Board, Note, this_machine
from harvest.share import Share

TIMEOUT = 120.0  # a network file system may show a change a minute late
_BEATS = 8  # in the time after which an owner is held for dead


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Another process' claim as this one has seen it."""

    shard: int
    number: int  # how often the shard has been taken over
    owner: str
    share: Share | None  # of all shards; None where the claim does not say
    machine: str
    every: float  # seconds between its beats
    note: Note | None  # None: not read yet
    since: float  # when this process saw it change last, or read it first
    has_changed: bool  # so its owner lives, or did at `since`


class Claims:
    """The claims of this process, kept alive by a thread, and what it knows of those of others.

    As a context manager it takes back at the end what it still holds.
    """

    def __init__(
        self,
        board: Board,
        share: Share,
        timeout: float = TIMEOUT,
        *,
        machine: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._share, self._timeout, self._clock = board, share, timeout, clock
        self._machine = machine or this_machine()
        self._mine: dict[int, str] = {}
        self._others: dict[str, Claim] = {}
        self._read_at = -math.inf
        self._lock = threading.Lock()  # for what this process holds: the thread may not write into what is given back
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="claims")

    def look(self, *, read: bool) -> None:
        """See which claims of others are there. With `read` also what they say, and now and then whether they have
        changed: of many processes that make many shards, few need to know."""
        now, mine = self._clock(), set(self._mine.values())
        names = [name for name in self._board.names() if name not in mine]
        due = now - self._read_at >= self._timeout / _BEATS
        self._read_at = now if read and due else self._read_at
        seen = {}
        for name in names:
            before = self._others.get(name)
            note = before.note if before is not None else None
            if read and (due or note is None):
                note = self._board.read(name)
            seen[name] = _seen(name, note, before, now)
        self._others = seen

    def others(self) -> dict[int, Claim]:
        """The claim that counts of each shard that another process has claimed, as of the last look."""
        return {claim.shard: claim for claim in sorted(self._others.values(), key=lambda claim: claim.number)}

    def is_dead(self, claim: Claim) -> bool:
        """Whether the owner of another's claim is known to be dead, or has been silent for too long."""
        if claim.note is None:
            return False
        if claim.machine == self._machine and self._board.is_abandoned(_name(claim.shard, claim.number)):
            return True
        return self._clock() - claim.since >= max(self._timeout, claim.every * _BEATS / 2)

    def take(self, shard: int) -> bool:
        """Claim a shard that nobody holds, or whose owner is dead; False if another process was faster."""
        assert shard not in self._mine, f"shard {shard} is this process' already"
        last = self.others().get(shard)
        name = _name(shard, last.number + 1 if last else 0)
        if not self._board.post(name, self._line()):
            return False
        with self._lock:
            self._mine[shard] = name
        return True

    def give_back(self, shard: int) -> None:
        """The shard is committed, or will not be made here."""
        with self._lock:
            if name := self._mine.pop(shard, ""):
                self._board.remove(name)

    def held(self) -> list[int]:
        """The shards that this process has claimed and not given back."""
        with self._lock:
            return sorted(self._mine)

    def _line(self) -> bytes:
        facts = {"owner": f"{platform.node()} process {os.getpid()}", "share": [self._share.index, self._share.count]}
        facts |= {"every": self._timeout / _BEATS, "machine": self._machine}
        facts |= {"once": uuid.uuid4().hex}  # a claim given back and made again is another one
        return json.dumps(facts).encode() + b"\n"

    def _beat(self) -> None:
        failed = False
        while not self._stopped.wait(self._timeout / _BEATS):
            for shard in self.held():
                with self._lock:
                    if (name := self._mine.get(shard)) is None:
                        continue
                    try:
                        self._board.beat(name)
                    except (OSError, UserError) as error:
                        if not failed:
                            print(f"the claim on shard {shard} cannot be kept ({error}); others may make it too")
                        failed = True

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for shard in self.held():
            self.give_back(shard)


def check_timeout(seconds: float) -> None:
    """Raises UserError for a --claim-timeout that would take every owner for dead, or none."""
    if not 1 <= seconds <= 86400:
        raise UserError(f"--claim-timeout is {seconds:g}; give 1 to 86400 seconds, such as {TIMEOUT:g}")


def _name(shard: int, number: int) -> str:
    return f"{shard:06d}.{number}"


def _seen(name: str, note: Note | None, before: Claim | None, now: float) -> Claim:
    assert CLAIM_NAME.fullmatch(name), name
    shard, number = map(int, name.split("."))
    facts = _facts(note.head if note is not None else b"")
    every = facts.get("every")
    known = before if before is not None and before.note is not None else None
    return Claim(
        shard=shard,
        number=number,
        owner=str(facts.get("owner", "an unknown process"))[:80],
        share=_share(facts.get("share")),
        machine=str(facts.get("machine", "")),
        every=float(every) if isinstance(every, float) and 0 < every < 86400 else 0.0,
        note=note,
        since=known.since if known is not None and known.note == note else now,
        has_changed=known is not None and (known.has_changed or known.note != note),
    )


def _facts(head: bytes) -> dict[str, Any]:
    """What a claim's first line says. One that cannot be read is a claim all the same, of an owner without a name."""
    try:
        facts = json.loads(head.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _share(found: Any) -> Share | None:
    if not isinstance(found, list) or len(found) != 2 or not all(type(number) is int for number in found):
        return None
    index, count = found
    return Share(index=index, count=count) if 0 <= index < count else None
