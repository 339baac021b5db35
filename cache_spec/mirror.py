"""The files of a cache in an object store, through copies on the local disk.

A file is fetched whole, in ranges of which many are in flight, and compared with the checksums of its commit record as
each range arrives: a damaged range is fetched again, and a file that stays damaged is refused by name. It gets its name
when it is whole. Of several processes that want the same file one fetches it and the others wait.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cache_spec.errors import CacheDamaged, RoomTooSmall
from cache_spec.files import Partial, crc32c, disk_full_as_error, exclusive
from cache_spec.layout import (
    CHECKSUM_BYTES,
    INTERNAL,
    activation_file_bytes,
    activation_files,
    checksum_bytes,
    chunk_bytes,
    chunks_in,
    plain_index,
    planner_files,
    shard_files,
)
from cache_spec.plan import HookPlan, Plan
from cache_spec.room import Room
from cache_spec.store import Store
from cache_spec.store_path import StorePath

RANGE_BYTES = 8 << 20  # of one request, or one inner chunk if that is more
IN_FLIGHT = 16  # requests for one file at a time
TRIES = 3  # of what arrives damaged
_BLOCK = 8 << 20
_FETCHING = f"{INTERNAL}/fetching"


@dataclass(frozen=True)
class _Range:
    """Whole inner chunks of an activation file, one after the other, and what follows the last one of the file."""

    first: int
    sums: tuple[str, ...]
    tail: bytes = b""


class Mirror:
    """Copies of the files of a cache below `folder`, which has room for so many bytes of them.

    Small files (columns, moments, the planner's arrays) do not wait for room, but count.
    """

    is_remote = True

    def __init__(
        self, store: Store, plan: Plan, records: Mapping[int, Mapping[str, Any]], folder: Path, room: Room
    ) -> None:
        self.room = room
        self._store, self._plan, self._records, self._folder = store, plan, records, folder
        self._n_renewed: dict[str, int] = {}

    @property
    def place(self) -> str:
        """As Files says: the URL."""
        return self._store.url

    def open(self, file: str) -> BinaryIO:
        """As Files says; fetches it if it is not there."""
        while (opened := self.room.open(self._folder / file)) is None:
            self._fetch(file)
        return opened

    def read(self, file: str, start: int, n_bytes: int) -> bytes:
        """As Files says; fetches no more than that."""
        if (opened := self.room.open(self._folder / file)) is not None:
            with opened:
                opened.seek(start)
                return opened.read(n_bytes)
        return self._store.read_range(file, start, n_bytes)

    def gather(self, files: Sequence[str]) -> None:
        """As Files says: fetches those that are not there, several at a time."""
        with ThreadPoolExecutor(IN_FLIGHT, "fetch") as pool:
            list(pool.map(self._fetch, [file for file in files if not (self._folder / file).exists()]))

    def renew(self, file: str) -> bool:
        """As Files says: removes the copy; after a few times there is no hope."""
        self.room.remove(self._folder / file)
        self._n_renewed[file] = self._n_renewed.get(file, 0) + 1
        return self._n_renewed[file] < TRIES

    def _fetch(self, file: str) -> None:
        """Bring a file unless another thread or process does so meanwhile."""
        lock = self._folder / _FETCHING / file.replace("/", ".")
        with exclusive(lock):
            if not (self._folder / file).exists():
                self._bring(file)
            lock.unlink()

    def _bring(self, file: str) -> None:
        shard = _shard_of(file)
        activation = None if shard is None else activation_files(self._plan, shard).get(file)
        path = self._folder / file
        if shard is None:
            self._bring_planned(file, path)
            return
        if activation is None:
            data = self._small(file, shard)
            with disk_full_as_error(path, len(data)), Partial(path) as partial:
                partial.write(data)
                partial.replace()
            return
        n_bytes = activation_file_bytes(self._plan, activation[0], shard)
        with disk_full_as_error(path, n_bytes), self.room.reserve(path, n_bytes) as partial:
            self._bring_ranges(file, shard, activation[0], partial)
            partial.replace()

    def _bring_ranges(self, file: str, shard: int, hook: HookPlan, partial: Partial) -> None:
        sums = self._records[shard]["files"][file]["crc32c"]
        ranges = _ranges_of(sums, plain_index(self._plan, hook, shard), chunk_bytes(self._plan, hook))
        assert len(sums) == chunks_in(self._plan, shard)
        with ThreadPoolExecutor(IN_FLIGHT, "fetch") as pool:
            futures = [pool.submit(self._bring_range, file, shard, hook, each, partial) for each in ranges]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure the others are of no use

    def _bring_range(self, file: str, shard: int, hook: HookPlan, wanted: _Range, partial: Partial) -> None:
        size = chunk_bytes(self._plan, hook)
        start, n_bytes = wanted.first * size, len(wanted.sums) * size + len(wanted.tail)
        what = ""
        for _ in range(TRIES):
            if self.room.stopping.is_set():
                raise CancelledError
            data = self._store.read_range(file, start, n_bytes)
            if not (what := _range_fault(data, wanted, size)):
                partial.write_at(start, data)
                return
        first = shard * self._plan.shard_rows + wanted.first * self._plan.chunk_rows
        last = first + len(wanted.sums) * self._plan.chunk_rows - 1
        raise self._damaged(file, f"{what} in rows {first} to {last}")

    def _small(self, file: str, shard: int) -> bytes:
        """The content of a small file, compared with its commit record."""
        sums = self._records[shard]["files"][file]["crc32c"]
        for _ in range(TRIES):
            if self.room.stopping.is_set():
                raise CancelledError
            data = self._store.read(file, shard_files(self._plan, shard)[file])
            values, tail = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
            if sums == [f"{crc32c(values):08x}"] and tail == checksum_bytes(int(sums[0], 16)):
                return data
        raise self._damaged(file, "fails its checksum")

    def _bring_planned(self, file: str, path: Path) -> None:
        """One of the planner's arrays, piece by piece, for nothing but its checksum says how large it is."""
        for _ in range(TRIES):
            if (n_bytes := self._store.size(file) or 0) > self.room.n_bytes:
                raise RoomTooSmall(
                    f"--cache-bytes {self.room.n_bytes:,} is too little: {self.place}/{file} has {n_bytes:,} bytes; "
                    f"give {n_bytes} or more"
                )
            found = hashlib.sha256()
            with (
                StorePath(self._store, file).open() as source,
                disk_full_as_error(path, n_bytes),
                Partial(path) as partial,
            ):
                while data := source.read(_BLOCK):
                    if self.room.stopping.is_set():
                        raise CancelledError
                    found.update(data)
                    partial.write(data)
                if found.hexdigest() == planner_files(self._plan)[file]:
                    partial.replace()
                    return
        raise self._damaged(file, "fails its checksum")

    def _damaged(self, file: str, what: str) -> CacheDamaged:
        return CacheDamaged(
            f"{self.place}/{file} {what}, {TRIES} times in a row; if `python -m cache_spec verify {self.place}` finds "
            "it damaged too, delete its commit record and run the same harvest, else run the command again"
        )


def _shard_of(file: str) -> int | None:
    """Of a shard's file, `layer_12/clean/c/7/0` or `rows/flags/c/7`; None for the planner's."""
    array, _, key = file.partition("/c/")
    return int(key.partition("/")[0]) if key and not array.startswith(INTERNAL) else None


def _ranges_of(sums: Sequence[str], tail: bytes, n_bytes: int) -> list[_Range]:
    """The ranges of a file whose inner chunks have these checksums and `n_bytes` each."""
    step = max(1, RANGE_BYTES // n_bytes)
    parts = [_Range(first, tuple(sums[first : first + step])) for first in range(0, len(sums), step)]
    return [*parts[:-1], _Range(parts[-1].first, parts[-1].sums, tail)]


def _range_fault(data: bytes, wanted: _Range, n_bytes: int) -> str:
    """What is wrong with what arrived; empty if nothing."""
    rows, whole = np.frombuffer(data, np.uint8), len(wanted.sums) * n_bytes
    if len(data) != whole + len(wanted.tail):
        return f"has {len(data):,} bytes instead of {whole + len(wanted.tail):,}"
    if any(f"{crc32c(rows[i * n_bytes : (i + 1) * n_bytes]):08x}" != own for i, own in enumerate(wanted.sums)):
        return "fails its checksum"
    return "" if data[whole:] == wanted.tail else "has a wrong index"
