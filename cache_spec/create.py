"""Making a cache folder, and closing it when its shards are there."""

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_spec.errors import CacheConflict, CacheIncomplete
from cache_spec.files import (
    PARTIAL,
    exclusive,
    readable_json,
    remove_stale_partials,
    seal,
    sync_folder,
    write_file,
    write_new_file,
)
from cache_spec.layout import (
    COMPLETE,
    HARVESTING,
    INTERNAL,
    LOCK,
    MANIFEST,
    PARTIAL_STATUS,
    PLAN,
    RECORDS,
    ROOT,
    archive_level,
    root_document,
    zarr_documents,
)
from cache_spec.plan import Plan, check_plan
from cache_spec.state import NO_LINKS, is_ours, read_plan, read_records, read_root
from cache_spec.store_path import Place, StorePath, place_of
from cache_spec.untrusted import refuse_links

_PACKAGES = ("numpy", "torch", "transformers")  # what decides the numbers, if it is installed


def create_cache(path: str | Path, plan: Plan) -> None:
    """Make the folder of a cache, ready for its shards. The same plan there already is a resume.

    Every array has its full planned shape from the start, so writers never resize or touch attributes.
    Raises CacheConflict if the folder holds another plan or something that is not a cache.
    """
    check_plan(plan)
    create_folder(Path(path), plan, opening_attributes(plan))


def create_folder(root: Path, plan: Plan, granary: dict[str, Any]) -> None:
    """The same with given attributes of the root, which also say whether it is to be an archive."""
    level = archive_level(granary)
    if (root / PLAN).exists():
        refuse_other_plan(root, plan)
        _make_lost_documents(root, plan, granary)
        _refuse_other_profile(root, level)
        remove_stale_partials(root)
        return
    _refuse_foreign_files(root, plan)
    (root / RECORDS).mkdir(parents=True, exist_ok=True)
    # The root comes first: it marks a folder whose creation was cut short as ours.
    write_new_file(root / ROOT, readable_json(root_document(granary, None)))
    refuse_other_root(root, plan)
    _refuse_other_profile(root, level)
    for name, document in zarr_documents(plan, level).items():
        write_file(root / name / ROOT, readable_json(document))
    for folder in {root.parent, root, root / INTERNAL, *((root / name).parent for name in zarr_documents(plan))}:
        sync_folder(folder)
    # The plan comes last: a folder that has one is ready.
    if not write_new_file(root / PLAN, readable_json(plan.to_json())):
        refuse_other_plan(root, plan)
    remove_stale_partials(root)


def _make_lost_documents(root: Path, plan: Plan, granary: dict[str, Any]) -> None:
    """A document that somebody deleted, for it was damaged, follows from the plan."""
    if not (root / ROOT).exists():
        write_new_file(root / ROOT, readable_json(root_document(granary, None)))
    for name, document in zarr_documents(plan, archive_level(granary)).items():
        if not (root / name / ROOT).exists():
            write_file(root / name / ROOT, readable_json(document))


def finalize_cache(path: str | Place, *, partial: bool = False) -> None:
    """Close a cache: manifest, then status and consolidated metadata. Can be repeated.

    With all shards there the status becomes "complete". With some missing it becomes "partial" if `partial`,
    else CacheIncomplete is raised; a partial cache can still be finished and closed again.
    """
    root = place_of(path)
    plan = read_plan(root)
    if isinstance(root, StorePath):
        _close(root, plan, partial)  # of several at once, all write the same
        return
    with exclusive(root / LOCK):
        _close(root, plan, partial)
    remove_stale_partials(root)


def _close(root: Place, plan: Plan, partial: bool) -> None:
    records = read_records(root, plan)
    status = COMPLETE if len(records) == plan.n_shards else PARTIAL_STATUS
    if status != COMPLETE and not partial:
        raise CacheIncomplete(
            f"{root} holds {len(records)} of {plan.n_shards} shards; run the same harvest again to finish it"
        )
    _replace(root / MANIFEST, readable_json(manifest(plan, status, records)))
    granary = {**read_root(root), "status": status}
    _replace(root / ROOT, readable_json(root_document(seal(granary), plan)))


def _replace(path: Place, data: bytes) -> None:
    if isinstance(path, StorePath):
        path.store.put(path.key, data)
    else:
        write_file(path, data)


def manifest(plan: Plan, status: str, records: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """All records in one document, for readers that cannot list a folder."""
    facts = {"spec_version": plan.spec_version, "cache_id": plan.cache_id, "status": status}
    return seal({**facts, "shards": {str(shard): record for shard, record in records.items()}})


def opening_attributes(plan: Plan) -> dict[str, Any]:
    """What the root says of the cache. Software is here, not in the plan: it does not name the content."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return seal(
        {
            "spec_version": plan.spec_version,
            "cache_id": plan.cache_id,
            "status": HARVESTING,
            "plan": PLAN,
            "versions": versions,
        }
    )


def refuse_other_plan(root: Place, plan: Plan) -> None:
    """Raises CacheConflict, with what differs, if the cache that is there has another plan."""
    there = read_plan(root)
    if there == plan:
        return
    differences = list(_differences(there.to_json(), plan.to_json()))
    shown = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
    raise CacheConflict(
        f"{root} holds a cache of another plan ({shown}); give the same facts to resume it, or another folder"
    )


def _refuse_other_profile(root: Path, level: int) -> None:
    there = archive_level(read_root(root))
    if there != level:
        names = [f"an archive of level {n}" if n else "no archive" for n in (there, level)]
        raise CacheConflict(f"{root} is {names[0]}, and {names[1]} is to be written; give another folder")


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            if key != "cache_id":
                yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (old, new) in enumerate(zip(there, here, strict=True)):
            yield from _differences(old, new, f"{name}[{i}]")
    elif there != here:
        yield f"{name} is {there!r:.80} there and {here!r:.80} here"


def _refuse_foreign_files(root: Path, plan: Plan) -> None:
    """Without a plan, a folder may hold only what an unfinished creation (or the planner's windows) left."""
    if not root.exists():
        return
    if not root.is_dir():
        raise CacheConflict(f"{root} is a file; give a folder that is new or empty")
    allowed = {INTERNAL}
    if is_ours(root):
        refuse_links(root, NO_LINKS)
        allowed |= {ROOT, *(name.split("/")[0] for name in zarr_documents(plan))}
    foreign = sorted(entry.name for entry in root.iterdir() if not entry.name.endswith(PARTIAL))
    foreign = [name for name in foreign if name not in allowed]
    if foreign:
        raise CacheConflict(
            f"{root} is no activation cache and is not empty (it holds '{foreign[0]}'); give a new or empty folder"
        )
    if is_ours(root):
        refuse_other_root(root, plan)


def refuse_other_root(root: Place, plan: Plan) -> None:
    """The same for a cache that has only a root yet."""
    if (found := read_root(root)["cache_id"]) != plan.cache_id:
        raise CacheConflict(
            f"{root} is a half-created cache of another plan ({found}); delete it or give another folder"
        )
