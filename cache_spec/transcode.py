"""A cache to a compressed archive of it, and back to the same bytes.

An archive is the same tree with the same plan; its activations are compressed inner chunk by inner chunk. It is
written like any cache, shard by shard with a record at the end of each, so a transcoding that was killed goes on.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from cache_spec.cache import ActivationCache
from cache_spec.commit import ShardWriter
from cache_spec.create import create_folder, finalize_cache
from cache_spec.errors import CacheConflict, CacheDamaged, UserError
from cache_spec.files import PARTIAL, Partial, crc32c, disk_full_as_error, seal, sync_folder
from cache_spec.layout import (
    ARCHIVE,
    CHECKSUM_BYTES,
    HARVESTING,
    INTERNAL,
    PLAN,
    activation_files,
    checksum_bytes,
    chunk_bytes,
    chunks_in,
    plain_index,
    planner_files,
    shard_files,
    shard_index,
)
from cache_spec.packing import pack_all, packed_chunks, unpack
from cache_spec.plan import HookPlan, Plan
from cache_spec.state import is_ours, read_record, read_root, stored_bytes
from cache_spec.verify import Advance

_GO_ON = "run the same command again, it goes on from the last finished shard"
_BLOCK = 2**24


def transcode(
    path: str | Path, out_path: str | Path, *, level: int = 5, advance: Advance = lambda n_bytes: None
) -> tuple[int, int]:
    """Write the archive of a cache, or the cache of an archive, into a new folder; returns the bytes of both.

    `level` is the compression, 1 (fast) to 9; going back it has no meaning. Every checksum is compared on the way.
    Raises CacheIncomplete or CacheDamaged for a source that is not whole, CacheConflict for a folder that holds
    something else, DiskFull, and UserError for a level out of range.
    """
    if not 1 <= level <= 9:
        raise UserError(f"--level is {level}; give 1 (fast) to 9 (small)")
    source, out = Path(path), Path(out_path)
    cache = ActivationCache.open(source, check=False)
    _refuse_inside(source, out)
    plan, granary = cache.plan, dict(cache.attributes)
    granary = {key: granary[key] for key in granary if key not in ("profile", "level", "crc32c")}
    granary |= {"status": HARVESTING} | ({} if cache.is_archive else {"profile": ARCHIVE, "level": level})
    if not (out / PLAN).exists():
        refuse_foreign(out, plan)
        for file, checksum in planner_files(plan).items():
            copy_planner_file(source / file, out / file, checksum)
    create_folder(out, plan, seal(granary))
    n_before, n_after = 0, 0
    for shard in cache.shards:
        record = read_record(out, plan, shard) or _write_shard(cache, out, shard, level)
        n_read = sum(stored_bytes(plan, shard, dict(cache.records[shard])).values())
        n_before, n_after = n_before + n_read, n_after + sum(stored_bytes(plan, shard, record).values())
        advance(n_read)
    finalize_cache(out)
    return n_before, n_after


def bytes_to_read(source: Path) -> int:
    """Bytes of the shards of a complete cache or archive. Raises as opening it does."""
    cache = ActivationCache.open(source, check=False)
    return sum(sum(stored_bytes(cache.plan, s, dict(cache.records[s])).values()) for s in cache.shards)


def _write_shard(cache: ActivationCache, out: Path, shard: int, level: int) -> dict[str, Any]:
    plan, old = cache.plan, dict(cache.records[shard])
    record = {key: value for key, value in old.items() if key not in (ARCHIVE, "crc32c")}
    activations = activation_files(plan, shard)
    needed = sum(shard_files(plan, shard).values())
    with disk_full_as_error(out, needed, _GO_ON), ExitStack() as stack:
        writer = ShardWriter(out, stack)
        packed: dict[str, Any] = {}
        for file, facts in old["files"].items():
            partial, path = writer.open(file), cache.path / file
            if file not in activations:
                data = path.read_bytes()
                checksum = crc32c(data[:-CHECKSUM_BYTES])
                if f"{checksum:08x}" != facts["crc32c"][0] or data[-CHECKSUM_BYTES:] != checksum_bytes(checksum):
                    raise CacheDamaged(f"{path} fails its checksum; mend the cache first")
                partial.write(data)
            elif cache.is_archive:
                _unpack_file(path, partial, cache, activations[file][0], shard, facts["crc32c"])
            else:
                packed[file] = _pack_file(path, partial, cache, activations[file][0], shard, level)
        return writer.commit(plan, record | ({ARCHIVE: packed} if packed else {}))


def _pack_file(
    path: Path, partial: Partial, cache: ActivationCache, hook: HookPlan, shard: int, level: int
) -> dict[str, Any]:
    """Compress one activation file; returns what the record says of it."""
    plan, file = cache.plan, str(path.relative_to(cache.path).as_posix())
    wanted, sums, lengths = cache.records[shard]["files"][file]["crc32c"], [], []
    with path.open("rb") as source:
        for data in pack_all(_sound_chunks(source, path, plan, hook, shard, wanted), level):
            partial.write(data)
            lengths.append(len(data))
            sums.append(f"{crc32c(data):08x}")
    tail = shard_index(plan, lengths)
    partial.write(tail)
    return {"bytes": sum(lengths) + len(tail), "crc32c": sums}


def _sound_chunks(
    source: BinaryIO, path: Path, plan: Plan, hook: HookPlan, shard: int, sums: list[str]
) -> Iterator[bytes]:
    """The inner chunks of an activation file, each compared with its checksum, and last the index."""
    for chunk in range(chunks_in(plan, shard)):
        rows = source.read(chunk_bytes(plan, hook))
        if f"{crc32c(rows):08x}" != sums[chunk]:
            raise CacheDamaged(f"{path} fails its checksum in inner chunk {chunk}; mend the cache first")
        yield rows
    if source.read() != plain_index(plan, hook, shard):
        raise CacheDamaged(f"{path} has a wrong index; mend the cache first")


def _unpack_file(
    path: Path, partial: Partial, cache: ActivationCache, hook: HookPlan, shard: int, sums: list[str]
) -> None:
    plan, file = cache.plan, str(path.relative_to(cache.path).as_posix())
    packed_sums = cache.records[shard][ARCHIVE][file]["crc32c"]
    with path.open("rb") as source:
        try:
            for chunk, data in enumerate(packed_chunks(source, plan, shard, packed_sums)):
                rows = unpack(data, plan, hook)
                if f"{crc32c(rows):08x}" != sums[chunk]:
                    raise CacheDamaged(f"unpacks to other rows than were packed, in inner chunk {chunk}")
                partial.write(rows)
        except CacheDamaged as error:
            raise CacheDamaged(f"{path} {error}; mend the archive first") from None
    partial.write(plain_index(plan, hook, shard))


def _refuse_inside(source: Path, out: Path) -> None:
    here, there = out.resolve(), source.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise CacheConflict(f"{out} and {source} lie in each other; give another folder")


def refuse_foreign(out: Path, plan: Plan) -> None:
    """Before the first file is written: nothing but what an unfinished copy of this cache left may be there."""
    if not out.exists():
        return
    begun = out.is_dir() and {e.name for e in out.iterdir() if not e.name.endswith(PARTIAL)} <= {INTERNAL}
    same = all(not (out / file).exists() or _sha256(out / file) == sum_ for file, sum_ in planner_files(plan).items())
    ours = is_ours(out) and read_root(out)["cache_id"] == plan.cache_id
    if not (begun or ours) or not same:
        raise CacheConflict(f"{out} is there and is no unfinished copy of this cache; give a new or empty folder")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_planner_file(source: Path, target: Path, checksum: str) -> None:
    """Copy a planner's file unless it is there; raises CacheDamaged if it is not what the plan says."""
    if target.exists():
        return
    size, digest = source.stat().st_size, hashlib.sha256()
    with disk_full_as_error(target, size, _GO_ON), source.open("rb") as file, Partial(target) as partial:
        while block := file.read(_BLOCK):
            digest.update(block)
            partial.write(block)
        if digest.hexdigest() != checksum:
            raise CacheDamaged(f"{source} fails its SHA-256; mend the cache first")
        partial.sync()
        partial.replace()
        sync_folder(target.parent)
