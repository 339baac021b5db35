"""How rows get from shard files into a buffer: through a mapping, or with positioned reads.

A mapping is for files that are, or soon will be, in the system's page cache. Positioned reads are for caches larger
than memory and for file systems over a network, where a page fault waits for one small read at a time.
Neither keeps a file's pages: resident memory does not grow with the cache.

Checksums. A mapped file is compared with them before its first row is used, the sample of the scale included, so all
damage is found before training starts. With positioned reads the sample checks only the chunks that it needs, and a
file is compared as a whole when training first comes to it, a shard at a time and in the thread that reads ahead:
checking all of a cache larger than memory first would read it twice. Either way no row is used unchecked.
"""

import mmap
import os
import re
import weakref
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from cache_spec.cache import ActivationCache
from cache_spec.errors import CacheDamaged, UserError
from cache_spec.info import bytes_for_people
from cache_spec.layout import ACTIVATION
from train.recent import Recent

IO = ("auto", "mmap", "pread")
MEMORY_SHARE = 0.5  # of the machine's memory: the rest is for training and for others
MAPPED_BYTES = 32 << 20  # read through mappings before their pages are let go
MAX_GAP = 64 << 10  # bytes of unwanted rows that one read runs over; beyond it, two reads
MAX_FILES = 256  # open at once; most systems allow a process 1024
_VECTOR = 1024  # buffers of one preadv: IOV_MAX on Linux and macOS
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "gpfs", "beegfs", "glusterfs", "afs", "9p"}
File = tuple[str, str, int]
"""(hook, variant, shard)"""


class Reader(Protocol):
    """Copies rows of a shard, given by number and rising, into `out` [n, d_model] fp16. For any number of threads."""

    def read(self, file: File, rows: np.ndarray, out: np.ndarray) -> None:
        """Raises CacheDamaged if the file is not what was recorded."""
        ...

    def read_sample(self, file: File, rows: np.ndarray, out: np.ndarray) -> None:
        """The same for a few rows at the start of many files."""
        ...


def choose_io(io: str, path: Path, n_bytes: int, url: str) -> tuple[str, str]:
    """("mmap" or "pread", why) to read `n_bytes` of the cache at `path`, or of copies there of one at a URL.

    Raises UserError for an unknown choice.
    """
    if io not in IO:
        raise UserError(f"--io {io} is unknown; it is one of {', '.join(IO)}")
    if url and io == "mmap":
        raise UserError(f"--io mmap is for a cache in a folder, not for {url}, whose copies come and go; leave it out")
    if url:
        return "pread", f"pread from copies in {path}"
    if io != "auto":
        return io, f"{io}, as asked for"
    kind = file_system(path)
    if kind in _NETWORK or kind == "fuse" or kind.startswith("fuse."):
        return "pread", f"pread: the cache is on {kind}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = n_bytes <= MEMORY_SHARE * memory
    return (
        "mmap" if fits else "pread",
        f"{'mmap' if fits else 'pread'}: {bytes_for_people(n_bytes)} to read {'fit' if fits else 'do not fit'} in "
        f"{MEMORY_SHARE:.0%} of the machine's {bytes_for_people(memory)}",
    )


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds a path, such as ext4; empty where the system does not say."""
    if not mounts.exists():
        return ""
    path, kind, longest = path.resolve(), "", -1
    for line in mounts.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])  # a space is \040
        if path.is_relative_to(point) and len(point) >= longest:  # of equal ones the last is on top
            kind, longest = after.split()[0], len(point)
    return kind


def open_reader(io: str, cache: ActivationCache, n_files: int) -> Reader:
    """The reader of that name, which keeps up to `n_files` files open."""
    n_files = min(n_files, MAX_FILES)
    return MappedReader(cache, n_files) if io == "mmap" else PositionedReader(cache, n_files)


class MappedReader:
    """Copies rows out of memory-mapped files."""

    def __init__(self, cache: ActivationCache, n_files: int) -> None:
        self._cache = cache
        self._maps: Recent[File, _Map] = Recent(n_files)
        self._n_read = 0

    def read(self, file: File, rows: np.ndarray, out: np.ndarray) -> None:
        """As Reader says."""
        np.take(self._maps.get(file, self._open).rows, rows, axis=0, out=out, mode="clip")
        self._n_read += out.nbytes  # two threads at once may lose a count, which is harmless
        if self._n_read >= MAPPED_BYTES:
            self._n_read = 0
            for each in self._maps:
                each.let_go()

    def read_sample(self, file: File, rows: np.ndarray, out: np.ndarray) -> None:
        """As Reader says: it checks the whole file, and leaves it in the page cache for training."""
        self.read(file, rows, out)

    def _open(self, file: File) -> "_Map":
        hook, _, shard = file
        shape = (self._cache.rows_in(shard), self._cache.hook(hook).d_model)
        n_bytes = shape[0] * shape[1] * ACTIVATION.itemsize
        with self._cache.open_activations(*file) as opened:
            return _Map(mmap.mmap(opened.fileno(), n_bytes, access=mmap.ACCESS_READ), shape)


class _Map:
    """A mapped file and its rows."""

    def __init__(self, memory: mmap.mmap, shape: tuple[int, ...]) -> None:
        self._memory = memory
        self.rows = np.frombuffer(memory, ACTIVATION).reshape(shape)

    def let_go(self) -> None:
        """Give the pages back; they stay in the page cache, and a thread that is reading gets them again."""
        self._memory.madvise(mmap.MADV_DONTNEED)


class PositionedReader:
    """Reads rows straight into the buffer, a contiguous range of the file a call."""

    def __init__(self, cache: ActivationCache, n_files: int) -> None:
        self._cache = cache
        self._files: Recent[File, _File] = Recent(n_files)

    def read(self, file: File, rows: np.ndarray, out: np.ndarray) -> None:
        """As Reader says."""
        _scatter(self._files.get(file, self._open), rows, out)

    def read_sample(self, file: File, rows: np.ndarray, out: np.ndarray) -> None:
        """As Reader says, of the chunks that hold the rows and no others."""
        numbers = rows // self._cache.plan.chunk_rows
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            out[chosen] = self._cache.chunk(*file, number)[rows[chosen] - number * self._cache.plan.chunk_rows]

    def prepare(self, file: File) -> None:
        """Open a file before its rows are asked for; it stays open until it is dropped, or many others were opened."""
        self._files.get(file, self._open)

    def drop(self, file: File) -> None:
        """Close a file, when nobody reads it any more."""
        self._files.drop(file)

    def files(self, *, opening: bool = False) -> list[File]:
        """Those that are open; with `opening` also those that somebody is about to open."""
        return self._files.keys(made=not opening)

    def drop_oldest(self) -> bool:
        """The same for the file that was read longest ago; says whether there was one."""
        return self._files.drop_oldest()

    def _open(self, file: File) -> "_File":
        return _File(self._cache.open_activations(*file))


class _File:
    """A file that is closed when nobody uses it any more, even if the store has long forgotten it."""

    def __init__(self, opened: BinaryIO) -> None:
        self._name, self._fd = opened.name, opened.fileno()
        weakref.finalize(self, opened.close)

    def read(self, buffers: list[memoryview], offset: int) -> None:
        """Fill the buffers from `offset` on. Raises CacheDamaged if the file ends before."""
        while buffers:
            n = os.preadv(self._fd, buffers[:_VECTOR], offset)
            if not n:
                raise CacheDamaged(f"{self._name} became shorter while it was read; is something writing to it?")
            offset += n
            while buffers and n >= len(buffers[0]):
                n -= len(buffers.pop(0))
            if n:
                buffers[0] = buffers[0][n:]


def _scatter(file: _File, rows: np.ndarray, out: np.ndarray) -> None:
    """Read rising rows: unwanted ones between them fall into a scrap buffer, or part the read if there are many."""
    row_bytes = out.shape[1] * ACTIVATION.itemsize
    target = out.data.cast("B")
    gaps = np.diff(rows) - 1
    cuts = np.flatnonzero(gaps) + 1  # places in `rows` where a run begins
    scrap = memoryview(bytearray(min(MAX_GAP, int(gaps.max(initial=0)) * row_bytes)))
    buffers: list[memoryview] = []
    begin = offset = int(rows[0]) * row_bytes
    for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
        first = int(rows[start]) * row_bytes
        if first - offset > len(scrap):
            file.read(buffers, begin)
            buffers, begin = [], first
        elif first > offset:
            buffers.append(scrap[: first - offset])
        buffers.append(target[start * row_bytes : end * row_bytes])
        offset = first + (end - start) * row_bytes
    file.read(buffers, begin)
