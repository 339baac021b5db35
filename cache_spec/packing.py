"""Inner chunks of an archive: each packed by Blosc and followed by its CRC, one after the other in their file."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from numcodecs import blosc

from cache_spec.errors import CacheDamaged
from cache_spec.files import crc32c
from cache_spec.layout import (
    CHECKSUM_BYTES,
    blosc_settings,
    checksum_bytes,
    chunk_bytes,
    chunks_in,
    shard_index,
    tail_bytes,
)
from cache_spec.plan import HookPlan, Plan


def pack(rows: bytes, level: int) -> bytes:
    """An inner chunk, chunk_rows fp16 rows -> what an archive stores of it."""
    settings = blosc_settings(level)
    data = blosc.compress(
        rows,
        settings["cname"].encode(),
        settings["clevel"],
        shuffle=blosc.BITSHUFFLE,
        blocksize=settings["blocksize"],
        typesize=settings["typesize"],
    )
    return data + checksum_bytes(crc32c(data))


def pack_all(chunks: Iterable[bytes], level: int) -> Iterator[bytes]:
    """Inner chunks, packed on all cores, in order.

    Never on the main thread: there Blosc shares one chunk between threads of its own, and the order in which these
    finish shows in the bytes, so that no two archives would be equal.
    """
    n_workers = os.cpu_count() or 1
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(n_workers) as pool:
        for rows in chunks:
            waiting.append(pool.submit(pack, rows, level))
            if len(waiting) > n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def unpack(data: bytes, plan: Plan, hook: HookPlan) -> bytes:
    """The rows of a stored inner chunk as they lie in a cache to work with. Raises CacheDamaged if it is none."""
    try:
        rows = blosc.decompress(data[:-CHECKSUM_BYTES])
    except RuntimeError as error:
        raise CacheDamaged(f"cannot be unpacked ({error})") from None
    if len(rows) != chunk_bytes(plan, hook):
        raise CacheDamaged(f"unpacks to {len(rows):,} bytes instead of {chunk_bytes(plan, hook):,}")
    return rows


def packed_chunks(file: BinaryIO, plan: Plan, shard: int, sums: list[str]) -> Iterator[bytes]:
    """The stored inner chunks of an archive's file, in order.

    Raises CacheDamaged (whose words go behind the file's name) for a chunk or an index that is not as recorded.
    """
    tail = tail_bytes(plan)
    n_bytes = file.seek(0, 2)
    file.seek(max(0, n_bytes - tail))
    index = file.read()
    lengths = np.frombuffer(index[:-CHECKSUM_BYTES], "<u8").reshape(-1, 2)[: chunks_in(plan, shard), 1]
    if n_bytes < tail or int(lengths.sum()) + tail != n_bytes or index != shard_index(plan, lengths.tolist()):
        raise CacheDamaged("has a wrong index or size")
    file.seek(0)
    for chunk, n in enumerate(lengths.tolist()):
        data = file.read(n)
        if f"{crc32c(data):08x}" != sums[chunk]:
            raise CacheDamaged(f"fails its checksum in inner chunk {chunk}")
        yield data
