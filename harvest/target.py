"""Where a harvest's cache comes to be: in a folder, or built in a scratch folder and put into an object store."""

import fcntl
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np

from cache_spec.commit import write_shard
from cache_spec.create import create_cache, finalize_cache
from cache_spec.errors import CacheConflict, UserError
from cache_spec.files import Partial, disk_full_as_error, exclusive, remove_stale_partials, sync_folder
from cache_spec.layout import CLAIMS, INTERNAL, LOCK, planner_files, record_file, shard_files
from cache_spec.plan import Plan
from cache_spec.publish import (
    check_writable,
    create_in_store,
    publish_shard,
    refuse_foreign_objects,
    remove_uploads,
    settle_all,
)
from cache_spec.state import is_ours
from cache_spec.store import Patience
from cache_spec.store_path import Place, StorePath, place_of
from harvest.claim_board import Board, FolderBoard
from harvest.store_board import StoreBoard

_PIECE_BYTES = 8 * 2**20
_CLAIMS = "claims"  # the folder of this machine's, among the scratch
Arrays = Mapping[tuple[str, str], np.ndarray]


class Target(Protocol):
    """A cache to be, which other processes may be making too."""

    @property
    def place(self) -> Place:
        """The cache."""
        ...

    @property
    def folder(self) -> Path:
        """Where the planner's windows are, on this machine's disk."""
        ...

    @property
    def scratch(self) -> Path | None:
        """The folder, if it holds a shard only while it is written."""
        ...

    def refuse_foreign(self) -> None:
        """Raises CacheConflict if there is something else; before the text is read, which can take minutes."""
        ...

    def planning(self) -> AbstractContextManager[None]:
        """While inside, no other process on this disk plans the cache."""
        ...

    def create(self, plan: Plan) -> None:
        """Make the cache, whose windows are in the folder. Raises CacheConflict if another plan was first."""
        ...

    def prepare(self, plan: Plan) -> None:
        """Have the windows in the folder, and clear or finish what killed processes left."""
        ...

    def write(self, plan: Plan, shard: int, arrays: Arrays, columns: Mapping[str, np.ndarray], n_threads: int) -> None:
        """Write a shard and commit it."""
        ...

    def board(self) -> Board:
        """Where the processes that make the cache claim its shards."""
        ...

    def close(self, plan: Plan) -> None:
        """Close the cache, all of whose shards are there."""
        ...


@contextmanager
def open_target(out: str | Path, scratch: Path | None, patience: Patience = Patience()) -> Iterator[Target]:
    """The target that --out and --scratch name. What a store's needed on this disk is gone afterwards.

    Raises UserError for a URL that names no store, and for --scratch without one.
    """
    place = place_of(out, patience)
    if isinstance(place, Path):
        if scratch is not None:
            raise UserError("--scratch is for a cache in an object store; a cache in a folder is built where it is")
        yield FolderTarget(place)
        return
    with ExitStack() as stack:
        yield StoreTarget(place, scratch, stack)


class FolderTarget:
    """A cache in a folder, which may be shared by machines."""

    scratch = None

    def __init__(self, out: Path) -> None:
        self.place = self.folder = out

    def refuse_foreign(self) -> None:
        """As Target says; `create_cache` looks more closely later."""
        out = self.folder
        if out.is_symlink() and not out.exists():
            raise CacheConflict(
                f"{out} is a link to {out.readlink()}, which is not there; make that folder or mend the link"
            )
        if out.exists() and not out.is_dir():
            raise CacheConflict(f"{out} is a file; give a folder that is new or empty with --out")
        if (above := next((folder for folder in out.parents if folder.exists()), None)) and not above.is_dir():
            raise CacheConflict(f"{above} is a file, so there can be no {out}; give another folder with --out")
        if not out.exists() or is_ours(out):
            return
        if foreign := sorted(entry.name for entry in out.iterdir() if entry.name != INTERNAL):
            raise CacheConflict(
                f"{out} is no activation cache and is not empty (it holds '{foreign[0]}'); give a new or empty folder"
            )

    @contextmanager
    def planning(self) -> Iterator[None]:
        """As Target says. Planning that fails leaves no new folder behind."""
        out = self.folder
        new = [folder for folder in (out / INTERNAL, out, *out.parents) if not folder.exists()]
        lock = out / LOCK
        _say_if_locked(lock)
        with ExitStack() as undo, exclusive(lock):
            undo.callback(_remove_unused, lock, new)
            yield
            undo.pop_all()

    def create(self, plan: Plan) -> None:
        """As Target says."""
        create_cache(self.folder, plan)

    def prepare(self, plan: Plan) -> None:
        """As Target says: a resume clears what killed processes left."""
        create_cache(self.folder, plan)

    def write(self, plan: Plan, shard: int, arrays: Arrays, columns: Mapping[str, np.ndarray], n_threads: int) -> None:
        """As Target says."""
        write_shard(self.folder, plan, shard, arrays, columns, n_threads=n_threads)

    def board(self) -> FolderBoard:
        """As Target says."""
        return FolderBoard(self.folder / CLAIMS)

    def close(self, plan: Plan) -> None:
        """As Target says."""
        board = self.board()
        board.clear()  # nobody reads them now
        finalize_cache(self.folder)
        board.clear()  # the folder, which may have held half of a claim


class StoreTarget:
    """A cache in a store. The processes of a machine share a scratch folder, in which each builds its shards."""

    def __init__(self, root: StorePath, scratch: Path | None, stack: ExitStack) -> None:
        self.place = root
        self.folder = self.scratch = _scratch_folder(root, scratch)
        self._stack, self._in_use = stack, False
        self._own = self.folder / uuid.uuid4().hex

    def refuse_foreign(self) -> None:
        """As Target says."""
        refuse_foreign_objects(self.place)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """As Target says. Processes elsewhere may plan too; `create` accepts what is the same."""
        check_writable(self.place)
        self._use()
        _say_if_locked(self.folder / LOCK)
        with exclusive(self.folder / LOCK):
            yield

    def create(self, plan: Plan) -> None:
        """As Target says."""
        create_in_store(self.place, plan, self.folder)

    def prepare(self, plan: Plan) -> None:
        """As Target says."""
        self._use()
        create_in_store(self.place, plan, self.folder)  # which is there, and of this plan
        settle_all(self.place, plan)
        with exclusive(self.folder / LOCK):
            for file in planner_files(plan):
                if not (self.folder / file).is_file():
                    _fetch(self.place / file, self.folder / file)

    def write(self, plan: Plan, shard: int, arrays: Arrays, columns: Mapping[str, np.ndarray], n_threads: int) -> None:
        """As Target says. The shard is on this disk only until it is in the store."""
        if self.place.store.size(record_file(shard)) is not None:
            return
        write_shard(self._own, plan, shard, arrays, columns, n_threads=n_threads)
        publish_shard(self.place, plan, shard, self._own)
        for file in (record_file(shard), *shard_files(plan, shard)):
            (self._own / file).unlink()

    def board(self) -> StoreBoard:
        """As Target says."""
        return StoreBoard(self.place.store, FolderBoard(self.folder / _CLAIMS))

    def close(self, plan: Plan) -> None:
        """As Target says."""
        self.board().clear()
        remove_uploads(self.place)
        finalize_cache(self.place)

    def _use(self) -> None:
        if not self._in_use:
            self._in_use = True
            self._stack.enter_context(_shared(self.folder))


def _scratch_folder(root: StorePath, scratch: Path | None) -> Path:
    """One for each URL, so that the processes of a machine share it. Nothing is made yet."""
    name = f"{root.name}-{sha256(str(root).encode()).hexdigest()[:12]}"
    if scratch is not None:
        if scratch.exists() and not scratch.is_dir():
            raise UserError(f"--scratch {scratch} is a file; give a folder on a disk with room")
        return scratch / name
    # The system's folder is everybody's: nobody else may have prepared ours.
    mine = Path(tempfile.gettempdir()) / f"granary-{os.getuid()}"
    found = mine.lstat() if os.path.lexists(mine) else None
    if found is not None and not (stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()):
        raise UserError(f"{mine} is not a folder of yours; remove it, or give a folder with --scratch")
    return mine / name


@contextmanager
def _shared(folder: Path) -> Iterator[None]:
    """A folder for the processes of this machine that use it at the same time: the first finds it empty, and the last
    takes it away. What killed processes left goes with it, or is the first one's to clear, but for their claims: by
    these the next process sees at once that their owners are dead.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = folder.with_name(f"{folder.name}.lock")
    fd = _join(folder, lock)
    try:
        folder.mkdir(exist_ok=True)
        yield
    finally:
        if _try_alone(fd):
            _clear(folder, ignore_errors=True)  # after a Ctrl-C the thread that writes may still be at it
            with suppress(OSError):  # it is not empty
                folder.rmdir()
            lock.unlink(missing_ok=True)
        os.close(fd)


def _join(folder: Path, lock: Path) -> int:
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        if _try_alone(fd):
            _clear(folder)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:  # 0: whoever was the last to leave has removed it
            return fd
        os.close(fd)


def _clear(folder: Path, ignore_errors: bool = False) -> None:
    """Remove everything but the claims of processes that are gone."""
    for left in folder.iterdir() if folder.exists() else ():
        if left.name == _CLAIMS:
            remove_stale_partials(left)
            with suppress(OSError):  # there are claims in it
                left.rmdir()
        else:
            shutil.rmtree(left, ignore_errors)


def _try_alone(fd: int) -> bool:
    """Whether no other process holds the lock, which then is this one's alone.

    False, too, for a lock that the last one to leave has removed: others may hold a new one, and the folder is theirs.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(fd).st_nlink > 0


def _fetch(source: StorePath, path: Path) -> None:
    """A planner's file from the store; whoever opens it compares its checksum."""
    with (
        source.open() as opened,
        disk_full_as_error(path, source.store.size(source.key) or 0),
        Partial(path) as partial,
    ):
        while data := opened.read(_PIECE_BYTES):
            partial.write(data)
        partial.sync()
        partial.replace()
        sync_folder(path.parent)


def _say_if_locked(lock: Path) -> None:
    if not lock.exists():
        return
    fd = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process is planning this cache; waiting for it", flush=True)
    finally:
        os.close(fd)


def _remove_unused(lock: Path, new: Sequence[Path]) -> None:
    """Remove the lock and the folders made for it, if they hold nothing else."""
    if new and [path.name for path in lock.parent.iterdir()] == [lock.name]:
        lock.unlink()
        for folder in new:
            if any(folder.iterdir()):
                break
            folder.rmdir()
