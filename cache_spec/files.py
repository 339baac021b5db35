"""Files that are either whole or not there: temporary name, fsync, rename, fsync of the folder.

A temporary file is locked by its writer for as long as the writer lives, so that whoever tidies up can
tell a file in progress from one that a killed process left behind, on any host and in any container.
"""

import errno
import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c

from cache_spec.errors import CacheDamaged, DiskFull, UserError
from cache_spec.store_path import Place, StorePath
from cache_spec.untrusted import MOST_BYTES, json_of, read_bounded

PARTIAL = ".partial"  # the end of every temporary name
_FOLDER_LOCK = "lock"  # in a temporary folder
_FULL = (errno.ENOSPC, errno.EDQUOT)


def crc32c(data: Any, before: int = 0) -> int:
    """The CRC-32C of bytes or of a contiguous array; with that of what came `before`, of both."""
    return google_crc32c.extend(before, data)


def canonical_json(facts: Any) -> bytes:
    """One spelling for equal facts: sorted keys, no spaces; refuses NaN. What hashes and checksums are taken of."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def readable_json(facts: Any) -> bytes:
    """The spelling of the files: indented, keys in the order given, refuses NaN."""
    return (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode()


def seal(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts and, last, the checksum of their canonical JSON, so that a changed bit in them is noticed."""
    return {**facts, "crc32c": f"{crc32c(canonical_json(facts)):08x}"}


def check_seal(sealed: Any, path: Place | str) -> dict[str, Any]:
    """The facts without their checksum; raises CacheDamaged if they do not match it."""
    facts = {key: value for key, value in sealed.items() if key != "crc32c"} if isinstance(sealed, dict) else {}
    if not facts or sealed != seal(facts):
        raise CacheDamaged(f"{path} does not match its own checksum, so it was changed after it was written")
    return facts


def read_json(path: Place, most: int = MOST_BYTES) -> Any:
    """Parsed JSON; raises CacheDamaged if the file is missing, cut short or mangled, or holds NaN or infinity.

    So it does for one of more than `most` bytes, or with lists and objects too deep in each other.
    """
    try:
        data = path.read_bytes(most) if isinstance(path, StorePath) else read_bounded(path, most)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheDamaged(f"{path} is missing") from None
    except UserError:
        raise
    except ValueError as error:
        raise CacheDamaged(f"{path} cannot be read: {error}") from None
    return parse_json(data, path)


def parse_json(data: bytes, where: Place | str) -> Any:
    """The same of what was read from `where`."""
    try:
        if not data.endswith(b"\n"):  # the only byte whose loss JSON would not notice
            raise ValueError("its end is missing")
        return json_of(data, finite=True)
    except ValueError as error:
        raise CacheDamaged(f"{where} is not JSON ({error}); it was changed after it was written") from None


class Partial:
    """A new file under a temporary name beside `final`. As a context manager it vanishes unless published."""

    def __init__(self, final: Path) -> None:
        self.final = final
        final.parent.mkdir(parents=True, exist_ok=True)
        self._fd, self._path = open_locked(final)

    def write(self, data: Any) -> None:
        """Append all of `data`; a short write goes on where it stopped."""
        left = memoryview(data).cast("B")
        with naming(self.final):
            while left:
                left = left[os.write(self._fd, left) :]

    def grow(self, n_bytes: int) -> None:
        """Give the file its size before its content, which `write_at` brings in any order."""
        with naming(self.final):
            os.ftruncate(self._fd, n_bytes)

    def write_at(self, offset: int, data: bytes) -> None:
        """Put data where it belongs; for any number of threads."""
        left = memoryview(data)
        with naming(self.final):
            while left:
                n_written = os.pwrite(self._fd, left, offset)
                left, offset = left[n_written:], offset + n_written

    def sync(self) -> None:
        """Return when the content is on the disk."""
        with naming(self.final):
            os.fsync(self._fd)

    def replace(self) -> None:
        """Give the file its final name, over whatever had it."""
        os.replace(self._path, self.final)

    def link(self) -> bool:
        """Give the file its final name unless something has it; says whether it did."""
        try:
            os.link(self._path, self.final)
        except FileExistsError:
            return False
        return True

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._fd)  # after the unlink: nobody may lock a name that is about to go


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into an OSError that names no file; those of a file descriptor do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def open_locked(final: Path) -> tuple[int, Path]:
    """A new file under a temporary name beside `final`, locked by this process: its descriptor and its path."""
    while True:
        path = final.parent / f".{final.name}.{uuid.uuid4().hex}{PARTIAL}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # 0: remove_stale_partials got in between
            return fd, path
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a file in one step."""
    with disk_full_as_error(path, len(data)), Partial(path) as partial:
        partial.write(data)
        partial.sync()
        partial.replace()
        sync_folder(path.parent)


def write_new_file(path: Path, data: bytes) -> bool:
    """Write a file in one step unless the name is taken; says whether it did. Of two writers one succeeds."""
    with disk_full_as_error(path, len(data)), Partial(path) as partial:
        partial.write(data)
        partial.sync()
        written = partial.link()
        sync_folder(path.parent)
        return written


def sync_folder(folder: Path) -> None:
    """Return when the folder's names are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file, made with its folder if it is not there; a second process waits. A killed process lets go."""
    fd = _locked(lock)
    try:
        yield
    finally:
        os.close(fd)


def _locked(lock: Path) -> int:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder went between the two calls
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # 0: whoever held it has removed it, and somebody else may hold a new one
            return fd
        os.close(fd)


@contextmanager
def disk_full_as_error(path: Path, n_bytes: int, advice: str = "run the command again") -> Iterator[None]:
    """Turn a full disk into DiskFull, with the bytes needed, the bytes free, and what to do when there is room."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free
        raise DiskFull(
            f"the disk (or quota) is full: {path} needs {n_bytes:,} bytes and {free:,} are free; make room and {advice}"
        ) from error


@contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """A new folder under a temporary name beside `final`, to be renamed to it when all is in it; else it vanishes.

    What killed writers left of folders of this name goes first.
    """
    remove_stale_partials_of(final)
    fd, place = _locked_folder(final)
    try:
        (place / "folder").mkdir()
        yield place / "folder"
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(fd)


def _locked_folder(final: Path) -> tuple[int, Path]:
    while True:
        place = final.parent / f".{final.name}.{uuid.uuid4().hex}{PARTIAL}"
        place.mkdir(parents=True)
        try:
            fd = os.open(place / _FOLDER_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # taken for stale before it had its lock
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, place
        os.close(fd)


def remove_stale_partials(root: Path) -> int:
    """Delete the temporary files that no living process is writing; returns how many."""
    return sum(map(_remove_if_stale, sorted(root.rglob(f".*{PARTIAL}"))))


def remove_stale_partials_of(path: Path) -> None:
    """The same for the temporary files and folders of one name, where others may be beside them."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        _remove_if_stale(left)


def _remove_if_stale(path: Path) -> bool:
    """Whether the temporary file or folder was left by a killed process; then it is gone."""
    lock = path / _FOLDER_LOCK if path.is_dir() else path
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:  # its writer finished, or was killed before it had a lock
        shutil.rmtree(path, ignore_errors=True)
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock == path:
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
