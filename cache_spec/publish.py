"""Writing a cache into an object store: create it, put its shards one by one, close it.

A store has no locks, and no rename that takes a shard's files all at once. So a shard's files are first put aside,
below a name that no other writer uses; then one writer's are chosen, by an object that is created once; then the
chosen ones are copied, within the store, to where they belong; then the record is created. Each step can be repeated,
by any process, and brings the same bytes. So a writer that is killed, that sleeps for an hour, or whose numbers differ
from another's in rounding, never leaves a shard that is not the one its record vouches for.
"""

import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cache_spec.create import opening_attributes, refuse_other_plan, refuse_other_root
from cache_spec.errors import CacheConflict, CacheDamaged, ObjectMissing, StoreError
from cache_spec.files import check_seal, parse_json, readable_json, seal
from cache_spec.layout import (
    INTERNAL,
    PLAN,
    ROOT,
    UPLOADS,
    planner_files,
    record_file,
    root_document,
    shard_files,
    zarr_documents,
)
from cache_spec.plan import Plan
from cache_spec.state import check_record, is_ours, parse_record, remedy
from cache_spec.store_path import StorePath

_AT_ONCE = 8  # requests for the files of a shard, most of which are small


def create_in_store(root: StorePath, plan: Plan, folder: Path) -> None:
    """Make the cache in the store, ready for its shards; the planner's files are in `folder`. Can be repeated.

    Of several processes one decides; for the others the same plan is fine. Raises CacheConflict for another one, and
    if there is something else at the URL.
    """
    store = root.store
    is_new = store.size(PLAN) is None
    if is_new:
        refuse_foreign_objects(root)
    else:
        refuse_other_plan(root, plan)
    # The root comes first: it decides which plan this is, and no file of another may be put over one of this.
    store.create(ROOT, readable_json(root_document(opening_attributes(plan), None)))
    refuse_other_root(root, plan)
    # Of a cache that is there, what somebody has deleted, for it was damaged.
    documents = {f"{name}/{ROOT}": document for name, document in zarr_documents(plan).items()}
    _each(lambda key: store.create(key, readable_json(documents[key])), documents)
    if is_new:
        for file in planner_files(plan):
            store.put_file(file, folder / file)
        # The plan comes last: a cache that has one is ready.
        store.create(PLAN, readable_json(plan.to_json()))
        refuse_other_plan(root, plan)


def refuse_foreign_objects(root: StorePath) -> None:
    """Raises CacheConflict if there is something at the URL that is no cache, nor the beginning of one."""
    keys = root.store.sizes(some=True)
    foreign = next((key for key in sorted(keys) if not key.startswith(f"{INTERNAL}/")), None)
    if foreign is not None and not is_ours(root):
        raise CacheConflict(
            f"{root} is no activation cache and is not empty (it holds '{foreign}'); give a URL with nothing below it"
        )


def check_writable(root: StorePath) -> None:
    """Raises StoreError if no object can be put at the URL, or one can be put twice; before the time planning takes."""
    store, key = root.store, f"{UPLOADS}/{uuid.uuid4().hex}"
    store.create(key, b"1")
    is_safe = any(not store.create(key, b"2") for _ in range(2))  # whoever closes the cache tidies up in between, once
    store.delete(key)
    if not is_safe:
        raise StoreError(
            f"the store of {root} puts an object over one that is there though it is told not to (If-None-Match), so "
            "two writers would spoil each other's shards; use another store, or a newer version of this one"
        )


def publish_shard(root: StorePath, plan: Plan, shard: int, folder: Path) -> dict[str, Any]:
    """Put a shard that `folder` holds, and commit it; returns the record that it has then, which is another's if that
    came first.
    """
    store, attempt = root.store, uuid.uuid4().hex
    record = parse_record(folder, plan, shard)
    if (committed := _committed(root, plan, shard)) is not None:
        return committed
    try:
        _each(lambda file: store.put_file(_aside(shard, attempt, file), folder / file), shard_files(plan, shard))
        decision = {"cache_id": plan.cache_id, "shard": shard, "attempt": attempt, "record": seal(record)}
        chosen = store.create(_decision(shard), readable_json(seal(decision)))
    except StoreError:
        # Whoever closes a cache tidies up, and this shard may have been committed by another in the meantime.
        if (committed := _committed(root, plan, shard)) is not None:
            return committed
        raise
    settle(root, plan, shard)
    if not chosen:
        _remove(root, [_aside(shard, attempt, file) for file in shard_files(plan, shard)])
    committed = _committed(root, plan, shard)
    if committed is None:
        raise CacheDamaged(f"{root / record_file(shard)} vanished as soon as it was there; run the same harvest again")
    return committed


def settle(root: StorePath, plan: Plan, shard: int) -> None:
    """Finish the shard of which one writer's files were chosen, if there is one, whoever that was. Can be repeated."""
    key, store = _decision(shard), root.store
    with remedy(f"delete {root / key} and run the same harvest again"):
        try:
            facts = check_seal(parse_json(store.read(key), root / key), root / key)
        except ObjectMissing:
            return
        attempt, sealed = facts.get("attempt"), facts.get("record")
        if facts.get("cache_id") != plan.cache_id or not isinstance(attempt, str) or not attempt.isalnum():
            raise CacheDamaged(f"{root / key} is not of this cache")
        record = check_record(sealed, plan, shard, root / key)
    sizes = shard_files(plan, shard)

    def place(file: str) -> None:
        store.copy(_aside(shard, attempt, file), file)
        if (found := store.size(file)) != sizes[file]:
            raise StoreError(f"{root / file} has {found} bytes instead of {sizes[file]:,}; run the same command again")

    # A decision made after the commit, by one who had not seen it, is void; so this comes after reading it.
    if store.size(record_file(shard)) is None:
        try:
            _each(place, sizes)
        except ObjectMissing as error:  # another process has finished the same, and tidied up
            if store.size(record_file(shard)) is None:
                raise CacheDamaged(
                    f"{root / key} has lost its files ({error}); delete it and run the same harvest again"
                ) from error
            return
        store.create(record_file(shard), readable_json(seal(record)))
        if store.size(record_file(shard)) is None:  # what follows takes away all that could make it
            raise StoreError(f"{root / record_file(shard)} is not there after it was put; run the same command again")
    _remove(root, [_aside(shard, attempt, file) for file in sizes])
    store.delete(key)  # last: without it nobody would look for the rest


def settle_all(root: StorePath, plan: Plan) -> list[int]:
    """Finish every shard whose files were chosen by a process that died before placing them; returns their numbers."""
    keys = [key for key in root.store.list(UPLOADS) if key.endswith(".json")]
    shards = [number for key in keys if 0 <= (number := _number(key)) < plan.n_shards]
    for shard in shards:
        settle(root, plan, shard)
    return shards


def remove_uploads(root: StorePath) -> None:
    """Delete what killed writers put aside, once every shard is committed."""
    _remove(root, root.store.list(UPLOADS))


def _committed(root: StorePath, plan: Plan, shard: int) -> dict[str, Any] | None:
    """The record of a shard, without a look at its files."""
    return parse_record(root, plan, shard) if root.store.size(record_file(shard)) is not None else None


def _aside(shard: int, attempt: str, file: str) -> str:
    return f"{UPLOADS}/{shard:06d}/{attempt}/{file}"


def _decision(shard: int) -> str:
    return f"{UPLOADS}/{shard:06d}.json"


def _number(key: str) -> int:
    stem = key.removeprefix(f"{UPLOADS}/").removesuffix(".json")
    return int(stem) if stem.isascii() and stem.isdigit() else -1


def _remove(root: StorePath, keys: Iterable[str]) -> None:
    _each(root.store.delete, keys)


def _each(work: Callable[[str], object], keys: Iterable[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE, "store") as pool:
        for done in [pool.submit(work, key) for key in keys]:
            done.result()
