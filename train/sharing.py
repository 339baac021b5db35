"""Batches that one rank of a machine reads and all of its ranks use, as they are stored, in memory that they share.

Why not each rank for itself: rows would be copied out of the page cache once a rank, a cache larger than memory would
be read from the disk once a rank, and each rank would compare every file with its checksums.

The memory is a ring of slots, each with the tensors of one step. The rank that reads fills a slot when all have used
what was in it, so no rank is ever more than a ring ahead of another. Nothing in it can stay locked when a process is
killed: each flag is written by one rank, and those who wait look again and again, also at the watch. The memory has no
name that could stay behind, and on Linux it is no part of /dev/shm, which containers keep small.
"""

import errno
import json
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_spec.errors import CacheDamaged, DiskFull, UserError
from train.mixing import Mixture
from train.ranks import Team
from train.run_folder import GO_ON
from train.watch import JobEnded

_POLL_SECONDS = 0.001
_PAGE = 4096
_MESSAGE_BYTES = _PAGE
_NOTHING, _EVERYTHING = -1, np.iinfo(np.int64).max  # as the number of a step
_READING, _DAMAGED, _STOPPED = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the ranks of a machine want of a stretch of steps: from the first that one of them needs, up to `last`."""

    first: int
    last: int
    mixtures: Set[Mixture]
    own_first: int
    """From which step on this rank wants rows."""


class Sharing:
    """The ranks of this machine that read together, as one of them sees it."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self.reads = team.rank.local_index == 0
        """Whether this is the rank that reads."""

    def agree(self, facts: object) -> object:
        """What the rank that reads says. All ranks of the machine call it."""
        return self._team.agree(facts, self._team.node)

    @contextmanager
    def ring(
        self, first: int, last: int, mixtures: Set[Mixture], *, n_slots: int, slot_bytes: Callable[[Set[Mixture]], int]
    ) -> Iterator["Ring"]:
        """The memory for a stretch of steps; each rank says from where on it wants rows, and which. All call it.

        Raises DiskFull if there is no room for it.
        """
        said = self._team.gather([first, last, [list(mixture) for mixture in mixtures]], self._team.node)
        wanted = Wanted(
            first=min(each[0] for each in said),
            last=max(each[1] for each in said),
            mixtures=frozenset(Mixture(*mixture) for each in said for mixture in each[2]),
            own_first=first,
        )
        ring = self._open(wanted, n_slots, slot_bytes(wanted.mixtures) if wanted.mixtures else 0)
        try:
            yield ring
        finally:
            ring.close()

    def _open(self, wanted: Wanted, n_slots: int, slot_bytes: int) -> "Ring":
        layout = _Layout(n_slots=n_slots, n_ranks=len(self._team.node), slot_bytes=-(-slot_bytes // _PAGE) * _PAGE)
        fd, path = _new_memory(layout.n_bytes) if self.reads else (-1, "")
        path = str(self._team.agree(path, self._team.node))
        if not self.reads:
            fd = _open_memory(path)
        memory = mmap.mmap(fd, layout.n_bytes)
        self._team.gather(None, self._team.node)  # everybody has it
        os.close(fd)
        if self.reads and not path.startswith("/proc/"):
            os.unlink(path)
        return Ring(self._team, wanted, layout, memory)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where things lie in the memory: flags, a message, and the slots."""

    n_slots: int
    n_ranks: int
    slot_bytes: int

    @property
    def n_flags(self) -> int:
        return 1 + self.n_slots + self.n_ranks * self.n_slots

    @property
    def start(self) -> int:
        """Of the slots."""
        return -(-self.n_flags * 8 // _PAGE) * _PAGE + _MESSAGE_BYTES

    @property
    def n_bytes(self) -> int:
        return self.start + self.n_slots * self.slot_bytes


class Ring:
    """The slots of a stretch of steps. Any number of threads of a rank may use it, each on a step of its own."""

    def __init__(self, team: Team, wanted: Wanted, layout: _Layout, memory: mmap.mmap) -> None:
        self.wanted = wanted
        self.reads = team.rank.local_index == 0
        self._team, self._layout, self._memory = team, layout, memory
        flags = np.frombuffer(memory, np.int64, layout.n_flags)
        self._state = flags[:1]
        self._ready = flags[1 : 1 + layout.n_slots]  # the step in each slot
        self._used = flags[1 + layout.n_slots :].reshape(layout.n_ranks, layout.n_slots)  # the last step a rank used
        self._own = self._used[team.rank.local_index]
        self._closing = False
        if self.reads:
            self._ready[:] = _NOTHING
            self._own[:] = _EVERYTHING  # it uses a slot right after it filled it
        else:
            self._own[:] = wanted.own_first - 1
        team.gather(None, team.node)  # the flags are set

    def tensors(self, step: int, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The fp16 tensors of a step, one after another in its slot."""
        at = self._layout.start + self._slot(step) * self._layout.slot_bytes
        found = []
        for n_rows, width in shapes:
            values = np.frombuffer(self._memory, np.float16, n_rows * width, at)
            found.append(torch.from_numpy(values).reshape(n_rows, width))
            at += values.nbytes
        return found

    @contextmanager
    def filling(self, step: int) -> Iterator[None]:
        """For the rank that reads: enter when all have used what was in the slot, and leave when it is filled."""
        slot = self._slot(step)
        self._wait(lambda: bool((self._used[:, slot] >= step - self._layout.n_slots).all()))
        _fence()
        try:
            yield
        except CacheDamaged as error:
            self._say(_DAMAGED, str(error))
            raise
        _fence()
        self._ready[slot] = step

    @contextmanager
    def using(self, step: int) -> Iterator[None]:
        """Enter when the rows of a step are there; afterwards they may go."""
        slot = self._slot(step)
        self._wait(lambda: int(self._ready[slot]) == step)
        _fence()
        yield
        _fence()
        if not self.reads:
            self._own[slot] = step

    def close(self) -> None:
        """This rank wants no more rows; one that reads has left off, or is done."""
        self._closing = True
        if self.reads and self._state[0] == _READING:
            self._state[0] = _STOPPED
        if not self.reads:
            self._own[:] = _EVERYTHING

    def stop_waiting(self) -> None:
        """Let this rank's own threads give up what they wait for."""
        self._closing = True

    def _slot(self, step: int) -> int:
        return (step - self.wanted.first) % self._layout.n_slots

    def _wait(self, until: Callable[[], bool]) -> None:
        while not until():
            if self._closing:
                raise JobEnded(f"training stopped while it waited for rows; {GO_ON}")
            if self._team.watch is not None:
                self._team.watch.check()
            if self._state[0] != _READING and not self.reads and not until():
                self._raise()
            time.sleep(_POLL_SECONDS)

    def _say(self, state: int, message: str) -> None:
        data = json.dumps(message).encode()[:_MESSAGE_BYTES]
        at = self._layout.start - _MESSAGE_BYTES
        self._memory[at : at + len(data)] = data
        _fence()
        self._state[0] = state

    def _raise(self) -> None:
        if self._state[0] == _DAMAGED:
            at = self._layout.start - _MESSAGE_BYTES
            message = self._memory[at : self._layout.start].rstrip(b"\0")
            raise CacheDamaged(json.loads(message))
        if self._team.watch is not None:
            self._team.watch.wait_for_reason()
            self._team.watch.check()
        raise JobEnded(f"{self._team.node[0]} reads no more rows; {GO_ON}")


def _new_memory(n_bytes: int) -> tuple[int, str]:
    """Memory that other processes can open, and how. Raises DiskFull if there is no room."""
    if sys.platform == "linux":
        fd = os.memfd_create("granary rows")
        path = f"/proc/{os.getpid()}/fd/{fd}"
    else:
        fd, path = tempfile.mkstemp(prefix="granary-rows-")
    try:
        if sys.platform == "linux":
            os.posix_fallocate(fd, 0, n_bytes)  # else a process would be killed when it first writes there
        else:
            os.ftruncate(fd, n_bytes)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        raise DiskFull(
            f"there is no room for the {n_bytes:,} bytes of memory in which the ranks of a machine share their batches "
            f"({error.strerror}); give it more memory, or lower --read-ahead or --batch-size"
        ) from None
    return fd, path


def _open_memory(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        raise UserError(
            f"{path}, the memory that another rank on this machine shares, cannot be opened ({error.strerror}); run "
            "all ranks of a machine as one user in one container"
        ) from None


def _fence() -> None:
    """What this thread wrote before is seen before what it writes afterwards, on any processor: releasing a lock and
    then taking one keeps them apart."""
    for _ in range(2):
        with _LOCK:
            pass


_LOCK = threading.Lock()
