"""Where the files of a cache are: in a folder, or in an object store and, for a while, in a local copy of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol


class Files(Protocol):
    """The shard files of a cache by their names in it, such as layer_12/clean/c/0/0. For any number of threads."""

    @property
    def place(self) -> str:
        """What to call the cache: the folder or the URL."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether a file may have to come over a network first."""
        ...

    def open(self, file: str) -> BinaryIO:
        """The whole file, which stays where it is while this, or a mapping of it, is open.

        Raises FileNotFoundError if the cache lacks it.
        """
        ...

    def read(self, file: str, start: int, n_bytes: int) -> bytes:
        """A part of a file, without the rest of it; less if the file ends before. Raises FileNotFoundError."""
        ...

    def gather(self, files: Sequence[str]) -> None:
        """Have small files at hand, which are then opened one by one."""
        ...

    def renew(self, file: str) -> bool:
        """Told that a file is damaged: whether opening or reading it again can give another one."""
        ...


class Folder:
    """Files that are where they were harvested."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def place(self) -> str:
        """As Files says."""
        return str(self._root)

    def open(self, file: str) -> BinaryIO:
        """As Files says."""
        return (self._root / file).open("rb")

    def read(self, file: str, start: int, n_bytes: int) -> bytes:
        """As Files says."""
        with self.open(file) as opened:
            opened.seek(start)
            return opened.read(n_bytes)

    def gather(self, files: Sequence[str]) -> None:
        """As Files says: they are at hand."""

    def renew(self, file: str) -> bool:
        """As Files says: it is the only one."""
        return False
