"""A place in an object store that is read like a folder's path: what reads a cache in a folder reads one there too.

It knows what reading needs and no more: objects are put by name, never by opening them for writing.
"""

import fnmatch
import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cache_spec.errors import ObjectMissing
from cache_spec.store import Patience, Store, open_store
from cache_spec.store_url import is_url
from cache_spec.untrusted import MOST_BYTES

_PIECE_BYTES, _AHEAD = 8 * 2**20, 4  # a request, and how many are under way while the piece before is used


@dataclass(frozen=True)
class StorePath:
    """A key below a store's URL; the empty one is the URL itself."""

    store: Store
    key: str = ""

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(self.store, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.store.url}/{self.key}" if self.key else self.store.url

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    def exists(self) -> bool:
        """Whether there is an object, or anything below."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object of this key."""
        return bool(self.key) and self.store.size(self.key) is not None

    def is_dir(self) -> bool:
        """Whether anything is below."""
        return bool(self.store.sizes(self.key, some=True))

    def read_bytes(self, most: int = MOST_BYTES) -> bytes:
        """The whole object. Raises ObjectMissing, which is a FileNotFoundError, and CacheDamaged for a larger one."""
        return self.store.read(self.key, most)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object as a file, of which the next pieces are fetched while one is read. Raises ObjectMissing."""
        assert mode == "rb", "objects are put whole"
        size = self.store.size(self.key)
        if size is None:
            raise ObjectMissing(f"{self} is not there; check the URL, or make it again")
        return io.BufferedReader(_Pieces(self.store, self.key, size), _PIECE_BYTES)

    def sizes(self) -> dict[str, int]:
        """The bytes of every object below, by its key from here on."""
        skip = len(self.key) + 1 if self.key else 0
        return {key[skip:]: size for key, size in self.store.sizes(self.key).items()}

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """The objects right below whose names match."""
        names = (name for name in self.sizes() if "/" not in name)
        return (self / name for name in fnmatch.filter(names, pattern))

    def files(self) -> list[str]:
        """The name from here on of every object below, in order."""
        return sorted(self.sizes())


Place = Path | StorePath


def place_of(text: str | Place, patience: Patience = Patience()) -> Place:
    """A folder's path, or the place in a store that a URL names; a place stays what it is."""
    if isinstance(text, str) and is_url(text):
        return StorePath(open_store(text, patience))
    return Path(text) if isinstance(text, str) else text


def size_of(path: Place) -> int | None:
    """The bytes of a file or object; None if there is none."""
    if isinstance(path, StorePath):
        return path.store.size(path.key)
    return path.stat().st_size if path.is_file() else None


def holds(path: Place, data: bytes) -> bool:
    """Whether a file or object has exactly this content; one of another size is not read."""
    if size_of(path) != len(data):
        return False
    return (path.read_bytes(len(data)) if isinstance(path, StorePath) else path.read_bytes()) == data


class _Pieces(io.RawIOBase):
    """An object read in pieces, a few of them ahead."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size, 0
        self._pool = ThreadPoolExecutor(_AHEAD, "read ahead") if size > _PIECE_BYTES else None
        self._coming: dict[int, Future[bytes]] = {}
        self._piece: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._at >= self._size:
            return 0
        number, start = divmod(self._at, _PIECE_BYTES)
        data = memoryview(self._fetched(number))[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetched(self, number: int) -> bytes:
        if self._piece[0] == number:
            return self._piece[1]
        if self._pool is None:
            self._piece = number, self._get(number)
            return self._piece[1]
        last = min(number + _AHEAD, -(-self._size // _PIECE_BYTES) - 1)
        for skipped in [n for n in self._coming if not number <= n <= last]:
            self._coming.pop(skipped).cancel()
        for wanted in range(number, last + 1):
            if wanted not in self._coming:
                self._coming[wanted] = self._pool.submit(self._get, wanted)
        self._piece = number, self._coming.pop(number).result()
        return self._piece[1]

    def _get(self, number: int) -> bytes:
        start = number * _PIECE_BYTES
        return self._store.read_range(self._key, start, min(_PIECE_BYTES, self._size - start))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()
