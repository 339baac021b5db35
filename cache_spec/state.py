"""What a cache says about itself, in a folder or in a store: its plan, its status, and which shards are committed."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from cache_spec.errors import CacheDamaged, CacheIncomplete, CacheNotFound
from cache_spec.files import check_seal, read_json
from cache_spec.layout import (
    ARCHIVE,
    COMPLETE,
    HARVESTING,
    MANIFEST,
    PARTIAL_STATUS,
    PLAN,
    RECORDS,
    ROOT,
    activation_files,
    archive_level,
    chunks_in,
    planner_files,
    record_file,
    shard_files,
    zarr_documents,
)
from cache_spec.plan import Plan, check_version
from cache_spec.store_path import Place, StorePath, place_of, size_of
from cache_spec.untrusted import MOST_BYTES, refuse_links

_AT_ONCE = 16  # records fetched from a store
NO_LINKS = "a cache has none: put the file itself there, or fetch the cache again"


def read_plan(root: Place) -> Plan:
    """The plan of the cache at `root`.

    Raises CacheNotFound if there is no cache, CacheIncomplete if its creation was cut short, CacheTooNew or
    CacheDamaged if the plan cannot be used, and CacheDamaged for a folder with a link in it.
    """
    if not root.exists():
        raise CacheNotFound(f"there is nothing at {root}; `python -m harvest --out {root}` makes a cache there")
    if not root.is_dir():
        raise CacheNotFound(f"{root} is a file; an activation cache is a folder, made by `python -m harvest`")
    if not (root / PLAN).exists():
        if is_ours(root):
            raise CacheIncomplete(f"{root} was being created when its writer stopped; run the same harvest again")
        raise CacheNotFound(f"{root} is a folder but no activation cache: it has no {PLAN}; give the cache's folder")
    if not isinstance(root, StorePath):
        refuse_links(root, NO_LINKS)
    with remedy("put a copy of it back, for nothing else says what it said, or harvest into another folder"):
        return Plan.from_json(read_json(root / PLAN), where=str(root / PLAN))


@contextmanager
def remedy(what_to_do: str) -> Iterator[None]:
    """Ends the sentence of a CacheDamaged with what to do."""
    try:
        yield
    except CacheDamaged as error:
        raise CacheDamaged(f"{error}; {what_to_do}") from None


def made_again(path: Place | str) -> str:
    return f"delete {path} and run the same harvest, which makes it again"


def is_ours(root: Place) -> bool:
    """Whether the folder's Zarr group was made by granary."""
    if not (root / ROOT).is_file():
        return False
    try:
        document = read_json(root / ROOT)
    except CacheDamaged:
        return False
    attributes = document.get("attributes") if isinstance(document, dict) else None
    return isinstance(attributes, dict) and "granary" in attributes


def read_root(root: Place) -> dict[str, Any]:
    """The cache's attributes: spec_version, cache_id, status, plan, versions; of an archive also profile and level."""
    with remedy(made_again(root / ROOT)):
        return check_root(read_json(root / ROOT), root / ROOT)


def check_root(document: Any, path: Place | str) -> dict[str, Any]:
    """The same of the root's document, which was read from `path`."""
    attributes = document.get("attributes") if isinstance(document, dict) else None
    granary = attributes.get("granary") if isinstance(attributes, dict) else None
    if not isinstance(granary, dict):
        raise CacheDamaged(f"{path} has no granary attributes; it was changed after it was written")
    check_version(granary.get("spec_version"), str(path))
    granary = check_seal(granary, path)
    if not isinstance(granary.get("cache_id"), str):
        raise CacheDamaged(f"{path} has the cache_id {granary.get('cache_id')!r:.60}, which is none")
    if granary.get("status") not in (HARVESTING, PARTIAL_STATUS, COMPLETE):
        raise CacheDamaged(f"{path} has the unknown status {granary.get('status')!r:.60}")
    level = granary.get("level")
    if "profile" in granary and not (granary["profile"] == ARCHIVE and type(level) is int and 1 <= level <= 9):
        raise CacheDamaged(f"{path} has the unknown profile {granary['profile']!r:.60} of level {level!r:.60}")
    return granary


def read_record(root: Place, plan: Plan, shard: int, sizes: Mapping[str, int] | None = None) -> dict[str, Any] | None:
    """The commit record of a shard, or None if it has none. `sizes` are those of all files, if they were listed.

    Raises CacheDamaged if the record is not one of this plan, or if a file of it is missing or has another size.
    """
    path = root / record_file(shard)
    if not path.exists():
        return None
    record = parse_record(root, plan, shard)
    check_sizes(root, plan, shard, record, sizes)
    return record


def check_sizes(
    root: Place, plan: Plan, shard: int, record: dict[str, Any], sizes: Mapping[str, int] | None = None
) -> None:
    """Raises CacheDamaged if a file of a recorded shard is missing or has another size than the record says."""
    for file, size in stored_bytes(plan, shard, record).items():
        found = _size(root, file) if sizes is None else sizes.get(file)
        if found is None:
            raise CacheDamaged(f"{root / file} is missing; {_repair(root / record_file(shard))}")
        if found != size:
            raise CacheDamaged(
                f"{root / file} has {found:,} bytes instead of {size:,}; {_repair(root / record_file(shard))}"
            )


def _size(root: Place, file: str) -> int | None:
    """None if there is no such file."""
    if isinstance(root, StorePath):
        return root.store.size(file)
    try:
        return os.stat(f"{root}/{file}").st_size  # there may be a hundred thousand files, and Path is slow
    except (FileNotFoundError, NotADirectoryError):
        return None


def stored_bytes(plan: Plan, shard: int, record: dict[str, Any]) -> dict[str, int]:
    """Every file of a recorded shard and its size as it lies on the disk."""
    packed = {file: facts["bytes"] for file, facts in record.get(ARCHIVE, {}).items()}
    return shard_files(plan, shard) | packed


def parse_record(root: Place, plan: Plan, shard: int) -> dict[str, Any]:
    """The commit record of a shard that has one, without a look at the files it names."""
    with remedy(_repair(root / record_file(shard))):
        return check_record(read_json(root / record_file(shard)), plan, shard, root / record_file(shard))


def check_record(raw: Any, plan: Plan, shard: int, path: Place | str) -> dict[str, Any]:
    """The same of a record's JSON, which was read from `path`."""
    if isinstance(raw, dict) and "spec_version" in raw:
        check_version(raw["spec_version"], str(path))
    record = check_seal(raw, path)
    if fault := _record_fault(record, plan, shard):
        raise CacheDamaged(f"{path} {fault}")
    return record


def _repair(record: Place | str) -> str:
    return f"to make the shard again delete {record} and run the same harvest"


def _record_fault(record: dict[str, Any], plan: Plan, shard: int) -> str:
    wanted = {"cache_id": plan.cache_id, "shard": shard, "rows": plan.rows_in(shard)}
    for key, value in wanted.items():
        if record.get(key) != value:
            return f"has {key} {record.get(key)!r:.60} and this cache wants {value!r}"
    n_moment_rows = record.get("moment_rows")
    if plan.has_moments and not (type(n_moment_rows) is int and 0 <= n_moment_rows <= plan.rows_in(shard)):
        return f"has {n_moment_rows!r:.60} for moment_rows"
    sizes, activations = shard_files(plan, shard), activation_files(plan, shard)
    if fault := _files_fault(record.get("files"), plan, shard, set(sizes)):
        return fault
    for file, facts in record["files"].items():
        if facts.get("bytes") != sizes[file]:
            return f"says {file} has {facts.get('bytes')} bytes and this plan wants {sizes[file]}"
        if file in activations and type(facts.get("absmax")) is not float:
            return f"has no absmax for {file}"
    if ARCHIVE in record:
        return _files_fault(record[ARCHIVE], plan, shard, set(activations))
    return ""


def _files_fault(files: Any, plan: Plan, shard: int, wanted: set[str]) -> str:
    if not isinstance(files, dict) or set(files) != wanted:
        return "does not list the files of this plan"
    activations = activation_files(plan, shard)
    for file, facts in files.items():
        n_sums = chunks_in(plan, shard) if file in activations else 1
        sums = facts.get("crc32c") if isinstance(facts, dict) else None
        if not isinstance(sums, list) or len(sums) != n_sums or not all(map(_is_sum, sums)):
            return f"has no {n_sums} checksums for {file}"
        if type(facts.get("bytes")) is not int or facts["bytes"] < 0:
            return f"has no size for {file}"
    return ""


def _is_sum(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{8}", text) is not None


def recorded_shards(root: Place) -> list[int]:
    """The numbers of the shards that have a record, sound or not, in order."""
    return sorted(int(path.stem) for path in (root / RECORDS).glob("*.json") if re.fullmatch(r"\d{6,}", path.stem))


def read_records(root: Place, plan: Plan) -> dict[int, dict[str, Any]]:
    """The commit record of each committed shard, in order. Raises CacheDamaged as `read_record` does."""
    shards = recorded_shards(root)
    for shard in shards:
        if shard >= plan.n_shards:
            raise CacheDamaged(f"{root / record_file(shard)} is for a shard beyond the plan's {plan.n_shards}")
    if isinstance(root, StorePath):
        sizes = root.sizes()
        with ThreadPoolExecutor(_AT_ONCE, "records") as pool:
            found = list(pool.map(lambda shard: read_record(root, plan, shard, sizes), shards))
    else:
        found = [read_record(root, plan, shard) for shard in shards]
    return {shard: record for shard, record in zip(shards, found, strict=True) if record is not None}


def committed_shards(path: str | Place, plan: Plan) -> tuple[int, ...]:
    """The shards that are whole, in order: what a resumed harvest need not make again."""
    return tuple(read_records(place_of(path), plan))


def read_document(root: Place, file: str) -> Any:
    """The JSON of a small file of the cache; the manifest, which repeats every record, may be larger than the others.

    Raises CacheDamaged.
    """
    if file != MANIFEST or (size_of(root / file) or 0) <= MOST_BYTES:
        return read_json(root / file)
    if isinstance(root, StorePath):
        n_bytes = sum((root / RECORDS).sizes().values())
    else:
        n_bytes = sum(path.stat().st_size for path in (root / RECORDS).glob("*.json"))
    return read_json(root / file, MOST_BYTES + 2 * n_bytes)


def check_documents(
    read: Callable[[str], Any], place: str, plan: Plan, granary: dict[str, Any], records: Mapping[int, dict[str, Any]]
) -> None:
    """Raises CacheDamaged if a small file of the cache is missing, cut short, or not what the plan and root say.

    `read` gives the JSON of a file of the cache at `place`, or raises CacheDamaged.
    """
    level = archive_level(granary)
    for name, document in zarr_documents(plan, level).items():
        with remedy(made_again(f"{place}/{name}/{ROOT}")):
            if read(f"{name}/{ROOT}") != document:
                raise CacheDamaged(f"{place}/{name}/{ROOT} does not describe what the plan says; it was changed")
    for shard, record in records.items():
        if (ARCHIVE in record) != bool(level):
            raise CacheDamaged(f"{place}/{record_file(shard)} is of another profile than {place}/{ROOT}")
    if granary["status"] != HARVESTING:
        with remedy(made_again(f"{place}/{MANIFEST}")):
            check_seal(read(MANIFEST), f"{place}/{MANIFEST}")


def check_planner_files(root: Path, plan: Plan) -> None:
    """Raises CacheDamaged if one of the planner's arrays, which are large, has not the size that it says."""
    for file in planner_files(plan):
        try:
            np.load(root / file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, TypeError, EOFError, ArithmeticError, SyntaxError, TokenError) as error:
            # numpy parses the header as Python, and what it says may be no shape and no type
            raise CacheDamaged(
                f"{root / file} is missing, cut short or changed ({error}); put a copy of it back, or harvest into "
                "another folder"
            ) from None
