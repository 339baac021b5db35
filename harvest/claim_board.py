"""Where claims hang: files in the cache's folder, each made by one process alone, which adds bytes while it lives.

A byte is added in place, against the rule of the house: what counts is that the file changed, torn or not, and a
network file system shows a growing file to others sooner than a name that was given to another one.
"""

import fcntl
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cache_spec.files import naming, open_locked

HEAD_BYTES = 1024  # what is read of a claim: its first line; all that follows is counted
_BOOT = Path("/proc/sys/kernel/random/boot_id")
CLAIM_NAME = re.compile(r"[0-9]{6,12}\.[0-9]{1,9}")


@dataclass(frozen=True, kw_only=True)
class Note:
    """A claim as it looks now."""

    head: bytes  # the first line, and maybe more
    n_bytes: int


class Board(Protocol):
    """What claims need of a place that processes share."""

    def names(self) -> list[str]:
        """The claims that are there."""
        ...

    def read(self, name: str) -> Note | None:
        """A claim as it looks now; None if it has been taken back."""
        ...

    def post(self, name: str, line: bytes) -> bool:
        """Make a claim, whole or not at all, unless the name is taken; says whether it did."""
        ...

    def beat(self, name: str) -> None:
        """Change a claim of this process."""
        ...

    def remove(self, name: str) -> None:
        """Take back a claim of this process."""
        ...

    def is_abandoned(self, name: str) -> bool:
        """Whether its owner is known to be dead; False where that cannot be known."""
        ...


def this_machine() -> str:
    """A name for this start of this machine, the same in all its containers that see its disk."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return f"{platform.node()} {boot}".strip()


class FolderBoard:
    """In a folder. An owner holds its files locked, so on its own machine its death is known at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}

    def names(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if CLAIM_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                )
        except FileNotFoundError:
            return []

    def read(self, name: str) -> Note | None:
        try:
            with open(self._folder / name, "rb") as file:
                return Note(head=file.read(HEAD_BYTES), n_bytes=os.fstat(file.fileno()).st_size)
        except FileNotFoundError:
            return None

    def post(self, name: str, line: bytes) -> bool:
        final = self._folder / name
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                fd, path = open_locked(final)
            except FileNotFoundError:  # the last process to leave took the empty folder with it
                continue
            break
        try:
            os.write(fd, line)
            os.fsync(fd)
            os.link(path, final)
        except FileExistsError:
            os.close(fd)
            return False
        except OSError:
            os.close(fd)
            raise
        finally:
            path.unlink(missing_ok=True)
        self._open[name] = fd
        return True

    def beat(self, name: str) -> None:
        if (fd := self._open.get(name)) is not None:
            with naming(self._folder / name):
                os.write(fd, b".")
                os.fsync(fd)

    def remove(self, name: str) -> None:
        if (fd := self._open.pop(name, None)) is None:  # another process has one of this name
            return
        os.close(fd)  # first: a network file system keeps a removed file that is open
        (self._folder / name).unlink(missing_ok=True)
        self._remove_folder()

    def remove_abandoned(self, name: str) -> None:
        """Remove a claim whose owner is known to be dead, if it is there."""
        if self.is_abandoned(name):
            (self._folder / name).unlink(missing_ok=True)

    def is_abandoned(self, name: str) -> bool:
        if name in self._open:
            return False
        try:
            fd = os.open(self._folder / name, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # taken back by now; or of another user, and may not be locked
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def clear(self) -> None:
        """Remove all claims: when every shard is committed they mean nothing."""
        for name in self.names():
            (self._folder / name).unlink(missing_ok=True)
        self._remove_folder()

    def _remove_folder(self) -> None:
        with suppress(OSError):  # it is not empty, or another process was faster
            self._folder.rmdir()
