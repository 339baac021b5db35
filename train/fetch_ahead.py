"""Fetching ahead: a thread that brings the files of a remote cache before training comes to them.

The order of the rows is known, so it looks over the coming steps, fetches the files that they need in the order of the
need, and keeps each open, so that nobody removes it, until the last step that was found to need it. What is kept open
is bounded; where room is short, what is needed last is let go first.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cache_spec.cache import ActivationCache
from cache_spec.errors import RoomTooSmall, UserError
from cache_spec.info import bytes_for_people
from cache_spec.layout import activation_file
from cache_spec.mirror import Mirror
from cache_spec.room import Room
from train.config import DataConfig
from train.read_ahead import Made, read_ahead
from train.readers import File, PositionedReader, Reader

_LOOK = 32  # steps that are looked over before anything is fetched: what they need is not let go
_log = logging.getLogger(__name__)


@dataclass
class _Use:
    """The first and the last step that was found to need a file."""

    first: int
    last: int


class FetchAhead:
    """Fetches files and keeps them open in the reader: at most `n_files`, of `n_bytes`.

    It looks `horizon` steps ahead for something to fetch. `prepare_rows` gets what else is needed of a shard.
    """

    def __init__(
        self,
        room: Room,
        reader: PositionedReader,
        bytes_of: Callable[[File], int],
        prepare_rows: Callable[[int], object],
        *,
        n_files: int,
        n_bytes: int,
        horizon: int,
    ) -> None:
        self._room, self._reader, self._bytes_of, self._prepare_rows = room, reader, bytes_of, prepare_rows
        self._n_files, self._n_bytes, self._horizon = n_files, n_bytes, max(horizon, _LOOK)
        self._changed = threading.Condition(threading.RLock())
        self._uses: dict[File, _Use] = {}
        self._at = 0
        self._thread: threading.Thread | None = None
        self._fetching: File | None = None
        room.holders.append(self.let_go)

    @contextmanager
    def running(self, steps: range, files_of: Callable[[int], Sequence[File]]) -> Iterator[None]:
        """Fetch for these steps until the end of the `with`, which also ends what other threads are fetching."""
        self._at = steps.start
        self._thread = threading.Thread(target=self._go, args=(steps, files_of), name="fetch-ahead")
        self._thread.start()
        try:
            yield
        finally:
            self._room.stopping.set()
            with self._changed:
                self._changed.notify_all()
            self._thread.join()
            self._thread = None
            self._uses.clear()
            self._retire(self._at + 1)

    @contextmanager
    def paused_at_the_end(self) -> Iterator[None]:
        """Around `running` and the threads that read meanwhile: after it anybody may fetch again."""
        try:
            yield
        finally:
            self._room.stopping.clear()

    def reached(self, step: int) -> None:
        """Nobody will read a step before this one any more."""
        with self._changed:
            if step > self._at:
                self._at = step
                self._changed.notify_all()

    def let_go(self) -> bool:
        """Let go of a file because somebody needs room: of the one needed last. Says whether there was one."""
        with self._changed:
            now = self._at
            if self._fetching is not None and threading.current_thread() is self._thread:
                now = max(now, self._uses[self._fetching].first)
            held = {file: self._uses[file] for file in self._reader.files() if file in self._uses}
            if later := [file for file, use in held.items() if use.first > now]:
                self._reader.drop(max(later, key=lambda file: held[file].first))
                return True
            if now > self._at:
                return False  # everything is needed before what is being fetched
            if not held:
                return self._reader.drop_oldest()
            self._reader.drop(min(held, key=lambda file: held[file].last))  # who needs it opens it again
            return True

    def _go(self, steps: range, files_of: Callable[[int], Sequence[File]]) -> None:
        left, seen = iter(steps), steps.start
        while not self._room.stopping.is_set():
            at = self._at
            while seen <= at + (self._horizon if self._next() is None else _LOOK):
                if (step := next(left, None)) is None:
                    break
                self._note(step, files_of(step))
                seen = step + 1
            self._retire(seen)
            if (file := self._next()) is not None and self._fits(file) and self._fetch(file):
                continue
            with self._changed:
                self._changed.wait_for(lambda at=at: self._at > at or self._room.stopping.is_set())

    def _note(self, step: int, files: Sequence[File]) -> None:
        with self._changed:
            for file in files:
                self._uses.setdefault(file, _Use(step, step)).last = step

    def _next(self) -> File | None:
        """Of the files that are not open the one that is needed first."""
        with self._changed:
            there = set(self._reader.files())
            missing = (file for file in self._uses if file not in there)
            return min(missing, key=lambda file: self._uses[file].first, default=None)

    def _fits(self, file: File) -> bool:
        held = [self._bytes_of(other) for other in self._reader.files(opening=True) if other != file]
        return not held or (len(held) < self._n_files and sum(held) + self._bytes_of(file) <= self._n_bytes)

    def _fetch(self, file: File) -> bool:
        """Fetch a file and keep it open. If that fails, whoever needs its rows tries again, and says why it failed."""
        self._fetching = file
        try:
            self._prepare_rows(file[2])
            self._reader.prepare(file)
        except (UserError, OSError, CancelledError) as error:
            _log.debug("not fetched ahead: %s", error)
            return False
        finally:
            self._fetching = None
        return True

    def _retire(self, seen: int) -> None:
        """Let go of the files that no step from the present one on was found to need."""
        with self._changed:
            if seen > self._at:
                self._uses = {file: use for file, use in self._uses.items() if use.last >= self._at}
                for file in self._reader.files(opening=True):
                    if file not in self._uses:
                        self._reader.drop(file)


def fetch_ahead_of(
    cache: ActivationCache,
    reader: Reader,
    arrays: Sequence[tuple[str, str]],
    prepare_rows: Callable[[int], object],
    *,
    n_open: int,
    n_files: int,
    horizon: int,
) -> FetchAhead | None:
    """For the train shards of a remote cache, of each of which training reads these arrays; None for a folder.

    Raises RoomTooSmall unless there is room for the shards that are open at a time and the next one.
    """
    if not isinstance(cache.files, Mirror):
        return None
    assert isinstance(reader, PositionedReader)
    room, records = cache.files.room, cache.records

    def bytes_of(file: File) -> int:
        return records[file[2]]["files"][activation_file(*file)]["bytes"]

    shards = [sum(bytes_of((*array, shard)) for array in arrays) for shard in cache.train_shards]
    needed = min(sum(shards), (n_open + 1) * max(shards))
    if needed > room.n_bytes:
        raise RoomTooSmall(
            f"--cache-bytes {bytes_for_people(room.n_bytes)} is too little: training reads {n_open} shards of "
            f"{bytes_for_people(max(shards))} at a time; give --cache-bytes {needed} or more, or fewer --open-shards"
        )
    n_bytes = max(needed, room.n_bytes // 2)  # others share the folder
    return FetchAhead(room, reader, bytes_of, prepare_rows, n_files=n_files, n_bytes=n_bytes, horizon=horizon)


@contextmanager
def fetch_and_read_ahead(
    ahead: FetchAhead | None,
    make: Callable[[int, int], Made],
    steps: range,
    files_of: Callable[[int], Sequence[File]],
    data: DataConfig,
    device: torch.device,
) -> Iterator[Iterator[Made]]:
    """`read_ahead`, with the files that the steps need fetched before; just `read_ahead` without `ahead`."""
    if ahead is None:
        with read_ahead(make, steps, n_slots=data.read_ahead, n_threads=data.readers, device=device) as results:
            yield results
        return

    def make_and_tell(step: int, slot: int) -> Made:
        ahead.reached(step - data.read_ahead + 1)
        return make(step, slot)

    with (
        ahead.paused_at_the_end(),
        read_ahead(make_and_tell, steps, n_slots=data.read_ahead, n_threads=data.readers, device=device) as results,
        ahead.running(steps, files_of),
    ):
        yield results
