"""A folder of copies that may take so many bytes, shared by any number of processes.

The folder may hold anything else. Copies are only in folders that were made for them here and say so, and of what is
in those only files that are named as copies are: nothing else is counted, opened or removed.

Whoever has a copy open, or a mapping of it, holds a shared lock on the file, and whoever writes one an exclusive lock;
a killed process lets go of both. To make room, the copies that were opened longest ago and that nobody holds go first.
"""

import fcntl
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from cache_spec.errors import DiskFull, RoomTooSmall, UserError
from cache_spec.files import PARTIAL, Partial, exclusive, write_file
from cache_spec.layout import INTERNAL

PATIENCE = 30.0  # seconds to wait until somebody lets go of a copy
_LOOK_AGAIN = 0.05
_LOCK = f"{INTERNAL}/lock"
_MARK = f"{INTERNAL}/copies"  # in a folder that was made for copies
_HOME = re.compile(r".+-[0-9a-f]{16}", re.DOTALL)
_COPY = re.compile(r"[0-9]+|\.[0-9]+\.[0-9a-f]{32}" + re.escape(PARTIAL))  # a shard's file, or what it comes as


class Room:
    """Copies in the `home`s of caches below `folder`, at most `n_bytes` of them. For any number of threads."""

    def __init__(self, folder: Path, n_bytes: int, patience: float = PATIENCE) -> None:
        self.folder, self.n_bytes, self.patience = folder, n_bytes, patience
        self.holders: list[Callable[[], bool]] = []
        """Asked one after the other to let go of one copy that they hold; True if they did."""
        self.stopping = threading.Event()
        """While it is set nothing is waited for and nothing more is fetched: whoever does so raises CancelledError."""

    def home(self, name: str) -> Path:
        """The folder for the copies of one cache, made if it is not there. The name ends in 16 hexadecimal digits."""
        assert _HOME.fullmatch(name), name
        home = self.folder / name
        if not (home / _MARK).exists():
            write_file(home / _MARK, b"Copies of a cache in an object store, which granary removes to make room.\n")
        return home

    def open(self, path: Path) -> BinaryIO | None:
        """A copy, which nobody removes while this, or a mapping of it, is open; None if it is not there."""
        try:
            opened = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(opened, fcntl.LOCK_SH)
        if not os.fstat(opened.fileno()).st_nlink:  # removed before it was locked
            opened.close()
            return None
        os.utime(opened.fileno())  # its place in the order of removal
        return opened

    def reserve(self, path: Path, n_bytes: int) -> Partial:
        """Begin a copy of this size; others go to make room. The caller enters it at once, writes and publishes it.

        Raises RoomTooSmall if there is no room, even after some waiting, and DiskFull if the disk has none.
        """
        deadline = time.monotonic() + self.patience
        while True:
            with exclusive(self.folder / _LOCK):
                limit, in_use = self._make_room(n_bytes)
                if in_use + n_bytes <= limit:
                    partial = Partial(path)
                    partial.grow(n_bytes)  # from now on it counts
                    return partial
            if n_bytes > limit or time.monotonic() > deadline:
                raise self._too_small(n_bytes, in_use, limit)
            if not any(let_go() for let_go in self.holders) and self.stopping.wait(_LOOK_AGAIN):
                raise CancelledError

    def remove(self, path: Path) -> None:
        """Remove a copy, whoever holds it: they keep what they have open."""
        with suppress(FileNotFoundError):
            path.unlink()

    def _make_room(self, n_bytes: int) -> tuple[int, int]:
        """Remove copies until `n_bytes` fit or all are held; gives what all may take, and what they take then."""
        copies = sorted(self._copies())
        in_use = sum(size for _, size, _ in copies)
        limit = min(self.n_bytes, in_use + shutil.disk_usage(self.folder).free)
        for _, size, path in copies:
            if in_use + n_bytes <= limit:
                break
            if _removed(path):
                in_use -= size
        return limit, in_use

    def _copies(self) -> Iterator[tuple[float, int, str]]:
        """When each was opened last, its bytes and path; one that is being written counts as oldest, but is held."""
        for folder, names, files in chain.from_iterable(map(os.walk, self._homes())):
            if INTERNAL in names:
                names.remove(INTERNAL)  # small, and not to be removed
            for name in filter(_COPY.fullmatch, files):
                path = f"{folder}/{name}"
                with suppress(FileNotFoundError):
                    facts = os.lstat(path)
                    if stat.S_ISREG(facts.st_mode):
                        yield (0.0 if name.endswith(PARTIAL) else facts.st_mtime), facts.st_size, path

    def _homes(self) -> list[str]:
        with os.scandir(self.folder) as entries:
            return [
                entry.path
                for entry in entries
                if _HOME.fullmatch(entry.name)
                and entry.is_dir(follow_symlinks=False)
                and os.path.isfile(f"{entry.path}/{_MARK}")
            ]

    def _too_small(self, n_bytes: int, in_use: int, limit: int) -> UserError:
        if limit < self.n_bytes:
            return DiskFull(
                f"the disk is full: a copy in {self.folder} needs {n_bytes:,} bytes, {max(0, limit - in_use):,} are "
                f"free and {in_use:,} held by what is open; make room or name another --cache-dir, and run the command "
                "again"
            )
        return RoomTooSmall(
            f"--cache-bytes {self.n_bytes:,} is too little: {in_use:,} bytes in {self.folder} are held by what is "
            f"open, and {n_bytes:,} more are needed; give --cache-bytes {in_use + n_bytes} or more"
        )


def _removed(path: str) -> bool:
    """Remove a copy that nobody holds; says whether it did."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
