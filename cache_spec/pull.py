"""A cache from the hub: each shard fetched beside the cache, compared with its record, and only then taken in.

The folder is one of a harvest that is not finished until the last shard is there, so a pull that was cut off never
looks complete; the same command goes on from the last shard, and within it from the last file.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cache_spec.create import create_folder, finalize_cache
from cache_spec.errors import CacheConflict, CacheDamaged, CacheIncomplete, CacheNotFound, DiskFull
from cache_spec.files import disk_full_as_error, exclusive, seal, sync_folder, write_new_file
from cache_spec.hub import HubError, Remote, Repository, fetch, look
from cache_spec.layout import COMPLETE, HARVESTING, INTERNAL, LOCK, PLAN, ROOT, planner_files, record_file, shard_files
from cache_spec.plan import Plan
from cache_spec.state import read_plan, read_record, read_root
from cache_spec.transcode import copy_planner_file, refuse_foreign
from cache_spec.untrusted import MOST_BYTES
from cache_spec.verify import check_shard

_INCOMING = f"{INTERNAL}/incoming"  # what has arrived and is not compared yet; goes when the cache is whole
_PULLING = f"{INTERNAL}/pulling"  # held by the one process that pulls
_AT_ONCE, _SMALL = 8, 2**24  # small files come several at a time; large ones alone, so that Ctrl-C is heard
_GO_ON = "run the same command again, it goes on from the last whole shard"
Advance = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class CachePull:
    """A cache on the hub, at one commit."""

    repository: Repository
    remote: Remote
    plan: Plan
    granary: dict  # what its root says of it

    def bytes_of(self, shard: int) -> int:
        """Bytes of one shard as the hub has them."""
        return sum(self.remote.files[name].size for name in shard_files(self.plan, shard))

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(map(self.bytes_of, range(self.plan.n_shards)))


def plan_pull(repository: Repository, revision: str | None = None) -> CachePull:
    """What is on the hub. Raises HubError, CacheNotFound for another thing, CacheIncomplete if it is not whole."""
    remote = look(repository, revision)
    name = repository.name
    if remote is None:
        raise HubError(f"the hub has no dataset '{name}' (404), or hides it from you; check the name and your login")
    if PLAN not in remote.files:
        raise CacheNotFound(f"'{name}' is no activation cache: it has no {PLAN}; give one that was pushed as one")
    unfinished = CacheIncomplete(f"'{name}' is not whole on the hub: its push was cut off; run the push again")
    if ROOT not in remote.files:
        raise unfinished
    with tempfile.TemporaryDirectory() as folder:
        for file in (PLAN, ROOT):
            if remote.files[file].size > MOST_BYTES:
                raise CacheDamaged(f"{file} of '{name}' has {remote.files[file].size:,} bytes, so it is no {file}")
            fetch(repository, file, remote.commit, Path(folder))
        plan, granary = read_plan(Path(folder)), read_root(Path(folder))
    if granary.get("cache_id") != plan.cache_id:
        raise CacheDamaged(f"'{name}' has the plan of one cache and the root of another; push it again")
    if granary["status"] != COMPLETE or plan.n_shards > len(remote.files):
        raise unfinished
    if not set(planner_files(plan)) <= set(remote.files):
        raise unfinished
    if not all({*shard_files(plan, s), record_file(s)} <= set(remote.files) for s in range(plan.n_shards)):
        raise unfinished
    return CachePull(repository=repository, remote=remote, plan=plan, granary=granary)


def pull_cache(pull: CachePull, out: Path, advance: Advance = lambda n_bytes: None) -> int:
    """Fetch what `out` lacks and close the cache; returns how many shards were fetched.

    Raises CacheConflict if `out` holds something else, CacheDamaged if a file arrived damaged, HubError and DiskFull.
    """
    plan = pull.plan
    if not (out / PLAN).exists():
        refuse_foreign(out, plan)
    elif read_plan(out) != plan:
        raise CacheConflict(f"{out} holds another cache than '{pull.repository.name}'; give another folder")
    with exclusive(out / _PULLING):
        if not (out / PLAN).exists():
            for file, checksum in planner_files(plan).items():
                copy_planner_file(_fetch(pull, file, out), out / file, checksum)
        create_folder(out, plan, seal({**pull.granary, "status": HARVESTING}))
        missing = [shard for shard in range(plan.n_shards) if read_record(out, plan, shard) is None]
        _check_room(pull, out, missing)
        for shard in range(plan.n_shards):
            if shard in missing:
                _fetch_shard(pull, shard, out)
            advance(pull.bytes_of(shard))
        finalize_cache(out)
        shutil.rmtree(out / _INCOMING, ignore_errors=True)
        (out / _PULLING).unlink()
    return len(missing)


def _fetch(pull: CachePull, file: str, out: Path) -> Path:
    with disk_full_as_error(out, pull.remote.files[file].size, _GO_ON):
        return fetch(pull.repository, file, pull.remote.commit, out / _INCOMING)


def _fetch_shard(pull: CachePull, shard: int, out: Path) -> None:
    """Fetch the files of a shard and its record, compare them, and take them in."""
    plan, incoming = pull.plan, out / _INCOMING
    names = [*shard_files(plan, shard), record_file(shard)]
    small = [name for name in names if pull.remote.files[name].size <= _SMALL]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: _fetch(pull, name, out), small))
    for name in names:
        if name not in small:
            _fetch(pull, name, out)
    if problems := list(check_shard(incoming, plan, shard, {})):
        for problem in problems:
            (incoming / problem.file).unlink(missing_ok=True)  # to be fetched again
        raise CacheDamaged(f"{problems[0].file} of '{pull.repository.name}' {problems[0].what} on arrival; {_GO_ON}")
    _take_in(incoming, out, plan, shard)


def _take_in(incoming: Path, out: Path, plan: Plan, shard: int) -> None:
    """Move the files to their places, then write the record, as whoever commits a shard does."""
    record = (incoming / record_file(shard)).read_bytes()
    with exclusive(out / LOCK):
        if read_record(out, plan, shard) is not None:
            return
        for name in shard_files(plan, shard):
            fd = os.open(incoming / name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(incoming / name, target)
            for folder in (target.parent, target.parent.parent):
                sync_folder(folder)
        assert write_new_file(out / record_file(shard), record), "the record appeared while the lock was held"
    (incoming / record_file(shard)).unlink()


def _check_room(pull: CachePull, out: Path, missing: list[int]) -> None:
    needed, free = sum(map(pull.bytes_of, missing)), shutil.disk_usage(out).free
    if needed > free:
        raise DiskFull(f"{out} needs {needed:,} bytes and {free:,} are free; make room or give another folder")
