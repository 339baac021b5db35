"""Opening a cache wherever it is: in a folder, or in an object store through copies on the local disk."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cache_spec.cache import ActivationCache
from cache_spec.copies import Copies, copies_for
from cache_spec.errors import CacheDamaged
from cache_spec.files import readable_json, seal, write_file
from cache_spec.layout import COMPLETE, HARVESTING, MANIFEST, PLAN, ROOT, record_file, zarr_documents
from cache_spec.mirror import IN_FLIGHT, Mirror
from cache_spec.plan import Plan
from cache_spec.room import Room
from cache_spec.state import (
    check_documents,
    check_record,
    check_sizes,
    made_again,
    read_document,
    read_plan,
    read_records,
    read_root,
    remedy,
)
from cache_spec.store_path import StorePath, place_of


def open_cache(
    place: str | Path, copies: Copies | None = None, *, allow_partial: bool = False, check: bool = True
) -> ActivationCache:
    """The cache at a folder or a URL (s3://, gs://, az://, file://), opened as `ActivationCache.open` does.

    Of a remote one, the small files are read now, and the others when they are used. Raises as `open` does, and
    StoreError where the store does not answer.
    """
    copies = copies or copies_for(place, None, "")
    root = place_of(place, copies.patience)
    if not isinstance(root, StorePath):
        return ActivationCache.open(root, allow_partial=allow_partial, check=check)
    plan, attributes = read_plan(root), read_root(root)
    names = [f"{name}/{ROOT}" for name in zarr_documents(plan)]
    names += [MANIFEST] if attributes["status"] != HARVESTING else []
    with ThreadPoolExecutor(IN_FLIGHT, "fetch") as pool:
        documents = dict(zip(names, pool.map(lambda name: _document(root, name), names), strict=True))
    records = _listed(root, plan, documents[MANIFEST]) if attributes["status"] == COMPLETE else read_records(root, plan)
    check_documents(documents.__getitem__, str(root), plan, attributes, records)
    room = Room(copies.folder, copies.n_bytes)
    folder = room.home(_folder_name(str(root), plan))
    if not (folder / PLAN).exists():
        write_file(folder / PLAN, readable_json(plan.to_json()))
    mirror = Mirror(root.store, plan, records, folder, room)
    return ActivationCache.of(folder, mirror, plan, attributes, records, allow_partial=allow_partial, check=check)


def _document(root: StorePath, name: str) -> Any:
    with remedy(made_again(root / name)):
        return read_document(root, name)


def _listed(root: StorePath, plan: Plan, manifest: Any) -> dict[int, dict[str, Any]]:
    """The commit records that a complete cache has all in its manifest, and a look at the size of each file."""
    listed = manifest.get("shards") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or not all(re.fullmatch(r"\d{1,12}", name, re.ASCII) for name in listed):
        raise CacheDamaged(f"{root / MANIFEST} lists no shards, so it was changed; {made_again(root / MANIFEST)}")
    records, sizes = {}, root.sizes()
    for shard, record in sorted((int(name), record) for name, record in listed.items()):
        path = root / record_file(shard)
        if shard >= plan.n_shards:
            raise CacheDamaged(f"{path} is for a shard beyond the plan's {plan.n_shards}")
        records[shard] = check_record(seal(record) if isinstance(record, dict) else record, plan, shard, path)
        check_sizes(root, plan, shard, records[shard], sizes)
    return records


def _folder_name(url: str, plan: Plan) -> str:
    """Of the copies of a cache. Another cache at the same URL has another one."""
    named = f"{url}\0{plan.cache_id}"
    return f"{url.rpartition('/')[2]}-{hashlib.sha256(named.encode()).hexdigest()[:16]}"
