"""Checking every byte of a cache against what was recorded when it was written."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cache_spec.create import manifest
from cache_spec.errors import CacheDamaged, CacheIncomplete
from cache_spec.files import check_seal, crc32c, read_json, readable_json, seal
from cache_spec.layout import (
    ARCHIVE,
    CHECKSUM_BYTES,
    COMPLETE,
    HARVESTING,
    LOCK,
    MANIFEST,
    PLAN,
    RECORDS,
    ROOT,
    activation_file_bytes,
    activation_files,
    archive_level,
    chunk_bytes,
    chunks_in,
    plain_index,
    planner_files,
    record_file,
    root_document,
    shard_files,
    zarr_documents,
)
from cache_spec.packing import packed_chunks, unpack
from cache_spec.plan import HookPlan, Plan
from cache_spec.state import parse_record, read_document, read_plan, read_root, recorded_shards, stored_bytes
from cache_spec.store_path import Place, StorePath, holds, place_of, size_of

DAMAGED, UNFINISHED, LEFTOVER = "damaged", "unfinished", "leftover"
Advance = Callable[[int], object]  # told the number of bytes just checked


@dataclass(frozen=True)
class Problem:
    """One file that is not as it should be. `kind` is "damaged", "unfinished" or "leftover" (harmless)."""

    file: str
    what: str
    kind: str = DAMAGED


def verify_cache(path: str | Place, *, advance: Advance = lambda n_bytes: None) -> list[Problem]:
    """Read the whole cache and compare every checksum, index and document; an empty list means all is whole.

    Also reports missing shards, and files that belong to no committed shard. Raises CacheNotFound, CacheTooNew,
    CacheIncomplete (creation cut short), or CacheDamaged when there is no sound plan to compare with.
    """
    root = place_of(path)
    plan = read_plan(root)
    shards = recorded_shards(root)
    records: dict[int, dict[str, Any]] = {}
    problems: list[Problem] = []
    for shard in shards:
        problems += check_shard(root, plan, shard, records, advance)
    problems += _check_documents(root, plan)
    problems += _check_profile(root, records)
    problems += _check_status(root, plan, shards, records)
    problems += _check_planner_files(root, plan)
    problems += _find_leftovers(root, plan, shards)
    return problems


def bytes_to_check(path: str | Place) -> int:
    """Bytes of all shards that have a record: what `verify_cache` reads. Raises as it does."""
    root = place_of(path)
    plan = read_plan(root)
    n_bytes = 0
    for shard in recorded_shards(root):
        try:
            n_bytes += sum(stored_bytes(plan, shard, parse_record(root, plan, shard)).values())
        except CacheDamaged:
            continue  # `verify_cache` says so, and does not read the shard
    return n_bytes


def check_shard(
    root: Place, plan: Plan, shard: int, records: dict[int, dict[str, Any]], advance: Advance = lambda n_bytes: None
) -> Iterator[Problem]:
    """Problems of one shard that has a record; puts that into `records` if it is sound."""
    file = record_file(shard)
    if shard >= plan.n_shards:
        yield Problem(file, f"is for a shard beyond the plan's {plan.n_shards}")
        return
    try:
        record = parse_record(root, plan, shard)
    except CacheDamaged as error:
        yield Problem(file, str(error))
        return
    records[shard] = record
    if not holds(root / file, readable_json(seal(record))):
        yield Problem(file, "is not spelled as it was written")
    for file, (hook, _) in activation_files(plan, shard).items():
        sums = record["files"][file]["crc32c"]
        if ARCHIVE in record:
            what = packed_fault(root / file, plan, hook, shard, sums, record[ARCHIVE][file]["crc32c"], advance)
        else:
            what = activation_fault(root / file, plan, hook, shard, sums, advance)
        yield from [Problem(file, what)] if what else []
    for file, facts in record["files"].items():
        if file in activation_files(plan, shard):
            continue
        what = _array_fault(root / file, facts["bytes"] - CHECKSUM_BYTES, facts["crc32c"][0], advance)
        yield from [Problem(file, what)] if what else []


def activation_fault(
    path: Place, plan: Plan, hook: HookPlan, shard: int, sums: list[str], advance: Advance = lambda n_bytes: None
) -> str:
    """What is wrong with an activation file; empty if nothing. Reads one inner chunk at a time."""
    if (found := size_of(path)) is None:
        return "is missing"
    if found != activation_file_bytes(plan, hook, shard):  # before memory is asked for by the plan
        return "has a wrong size"
    size, index = chunk_bytes(plan, hook), plain_index(plan, hook, shard)
    with path.open("rb") as file:
        for chunk in range(chunks_in(plan, shard)):
            data = file.read(size)
            advance(len(data))
            if f"{crc32c(data):08x}" != sums[chunk]:
                first = shard * plan.shard_rows + chunk * plan.chunk_rows
                return f"fails its checksum in rows {first} to {first + plan.chunk_rows - 1}"
        tail = file.read(len(index) + 1)
        advance(len(tail))
    return "" if tail == index else "has a wrong index"


def packed_fault(
    path: Place,
    plan: Plan,
    hook: HookPlan,
    shard: int,
    sums: list[str],
    packed_sums: list[str],
    advance: Advance = lambda n_bytes: None,
) -> str:
    """The same for an activation file of an archive, whose inner chunks have checksums packed and unpacked."""
    if not path.is_file():
        return "is missing"
    with path.open("rb") as file:
        try:
            for chunk, data in enumerate(packed_chunks(file, plan, shard, packed_sums)):
                advance(len(data))
                if f"{crc32c(unpack(data, plan, hook)):08x}" != sums[chunk]:
                    return f"fails the checksum of its inner chunk {chunk} when it is unpacked"
        except CacheDamaged as error:
            return str(error)
    return ""


def _array_fault(path: Place, size: int, checksum: str, advance: Advance) -> str:
    """What is wrong with a file of one chunk and its CRC: a column's, or one of moments."""
    if (found := size_of(path)) is None:
        return "is missing"
    if found != size + CHECKSUM_BYTES:
        return "has a wrong size"
    with path.open("rb") as file:
        data = file.read(found)
    advance(len(data))
    values, tail = data[:size], data[size:]
    if f"{crc32c(values):08x}" != checksum:
        return "fails its checksum"
    return "" if tail == bytes.fromhex(checksum)[::-1] else "has a wrong checksum"


def _check_documents(root: Place, plan: Plan) -> Iterator[Problem]:
    """The plan and each Zarr document below the root, all of which follow from the plan."""
    if not holds(root / PLAN, readable_json(plan.to_json())):
        yield Problem(PLAN, "is not spelled as it was written")
    for name, document in zarr_documents(plan, _level(root)).items():
        file = f"{name}/{ROOT}"
        try:
            read_json(root / file)  # which says what is wrong with a file that is no JSON
            same = holds(root / file, readable_json(document))
        except CacheDamaged as error:
            yield Problem(file, str(error))
            continue
        if not same:
            yield Problem(file, "does not describe what the plan says")


def _level(root: Place) -> int:
    """Of compression; of a root that cannot be read, what is usual, since that is a problem of its own."""
    try:
        return archive_level(read_root(root))
    except CacheDamaged:
        return 0


def _check_profile(root: Place, records: dict[int, dict[str, Any]]) -> Iterator[Problem]:
    for shard, record in records.items():
        if (ARCHIVE in record) != bool(_level(root)):
            yield Problem(record_file(shard), "is not of the profile that the root tells of")


def _check_status(root: Place, plan: Plan, shards: list[int], records: dict[int, dict[str, Any]]) -> Iterator[Problem]:
    """The root group, and whether the shards and the manifest are what its status promises."""
    try:
        granary = read_root(root)
        wanted = root_document(seal(granary), plan if granary["status"] != HARVESTING else None)
        if granary["cache_id"] != plan.cache_id or not holds(root / ROOT, readable_json(wanted)):
            yield Problem(ROOT, "does not describe what the plan says")
    except CacheDamaged as error:
        yield Problem(ROOT, str(error))
        return
    status, n_missing = granary["status"], plan.n_shards - len([s for s in shards if s < plan.n_shards])
    if n_missing:
        kind = DAMAGED if status == COMPLETE else UNFINISHED
        yield Problem(RECORDS, f"lacks the records of {n_missing} of {plan.n_shards} shards", kind)
    if status == HARVESTING:
        if not n_missing:
            yield Problem(ROOT, "says harvesting, though every shard is there", UNFINISHED)
        return
    yield from _check_manifest(root, plan, status, records)


def _check_manifest(root: Place, plan: Plan, status: str, records: dict[int, dict[str, Any]]) -> Iterator[Problem]:
    """A complete cache lists all records; one that was closed early may have gained shards since."""
    try:
        listed = check_seal(read_document(root, MANIFEST), root / MANIFEST).get("shards")
    except CacheDamaged as error:
        yield Problem(MANIFEST, str(error))
        return
    kept = {s: r for s, r in records.items() if status == COMPLETE or (isinstance(listed, dict) and str(s) in listed)}
    if not holds(root / MANIFEST, readable_json(manifest(plan, status, kept))):
        yield Problem(MANIFEST, "does not list the commit records that are there")


def _check_planner_files(root: Place, plan: Plan) -> Iterator[Problem]:
    for file, wanted in planner_files(plan).items():
        if not (root / file).is_file():
            yield Problem(file, "is missing")
            continue
        with (root / file).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != wanted:
                yield Problem(file, "fails its SHA-256")


def _find_leftovers(root: Place, plan: Plan, shards: list[int]) -> Iterator[Problem]:
    """Files that belong to no committed shard: of a writer at work, or of one that was stopped."""
    known = {ROOT, PLAN, MANIFEST, LOCK, *planner_files(plan), *map(record_file, shards)}
    known |= {f"{name}/{ROOT}" for name in zarr_documents(plan)}  # the names do not depend on the profile
    for shard in shards:
        known |= set(shard_files(plan, shard)) if shard < plan.n_shards else set()
    for file in _files_below(root):
        if file not in known:
            yield Problem(file, "belongs to no committed shard", LEFTOVER)


def _files_below(root: Place) -> list[str]:
    if isinstance(root, StorePath):
        return root.files()
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if not path.is_dir()]


def verdict(path: str | Place, n_bytes: int, problems: list[Problem]) -> dict[str, Any]:
    """What `verify --json` prints; docs/shell.md has the keys."""
    return {
        "path": str(path),
        "whole": all(problem.kind == LEFTOVER for problem in problems),
        "bytes_checked": n_bytes,
        "problems": [asdict(problem) for problem in problems],
    }


def raise_if_not_whole(path: str | Place, problems: list[Problem]) -> None:
    """Raises CacheDamaged with the names of the damaged files, or CacheIncomplete; leftovers are no harm."""
    damaged = [problem.file for problem in problems if problem.kind == DAMAGED]
    if damaged:
        shown = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        archive = "an archive is not mended; transcode its cache again, or unpack what is whole"
        raise CacheDamaged(f"{path} is damaged in {shown}; {archive if _level(place_of(path)) else _remedy(damaged)}")
    for problem in problems:
        if problem.kind == UNFINISHED:
            raise CacheIncomplete(f"{path} is not finished ({problem.file} {problem.what}); run the same harvest again")


def _remedy(damaged: list[str]) -> str:
    """What to do about files of a cache that are not as they were written."""
    alone = [file for file in damaged if file == PLAN or file.endswith(".npy")]
    documents = [file for file in damaged if file == MANIFEST or (file.endswith(ROOT) and file not in alone)]
    remedies = []
    if len(alone) + len(documents) < len(damaged):
        remedies.append(f"to make a shard again delete its record in {RECORDS}/ and run the same harvest")
    if documents:
        remedies.append(f"delete {documents[0]} and run the same harvest, which makes it again")
    if alone:
        remedies.append(f"put a copy of {alone[0]} back, or harvest into another folder")
    return "; ".join(remedies)
