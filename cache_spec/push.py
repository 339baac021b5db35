"""A cache to the hub: shard by shard with its record, and last of all the root, without which nobody sees a cache.

One commit holds whole shards, each with its record. The repository has no root document until every shard is there,
so a push that was cut off never looks complete, and the same command sends what is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_spec.cache import ActivationCache
from cache_spec.errors import CacheConflict, CacheDamaged
from cache_spec.hub import (
    ATTRIBUTES,
    README,
    Remote,
    Repository,
    check_login,
    check_visibility,
    commit,
    look,
    make,
)
from cache_spec.info import bytes_for_people
from cache_spec.layout import MANIFEST, PLAN, ROOT, planner_files, record_file, zarr_documents
from cache_spec.markdown import front_matter, plain, table
from cache_spec.state import stored_bytes
from cache_spec.verify import check_shard

_COMMIT_BYTES, _COMMIT_FILES = 2**31, 400
Advance = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class CachePush:
    """What is to be where in the repository, in the order in which it goes there."""

    cache: ActivationCache
    card: str
    first: dict[str, Path]  # what follows from the plan
    shards: dict[int, dict[str, Path]]  # the record last
    last: dict[str, Path]  # manifest and root

    @property
    def files(self) -> dict[str, Path]:
        """Every file but the card."""
        shards = {name: path for files in self.shards.values() for name, path in files.items()}
        return {**self.first, **shards, **self.last}


def plan_push(path: Path, repository: Repository) -> CachePush:
    """Everything that a push would send. Raises CacheIncomplete or CacheDamaged for a cache that is not whole."""
    cache = ActivationCache.open(path)
    plan = cache.plan
    first = [PLAN, *planner_files(plan), *(f"{name}/{ROOT}" for name in zarr_documents(plan))]
    shards = {
        shard: [*stored_bytes(plan, shard, dict(cache.records[shard])), record_file(shard)] for shard in cache.shards
    }
    return CachePush(
        cache=cache,
        card=cache_card(cache, repository),
        first={name: cache.path / name for name in first},
        shards={shard: {name: cache.path / name for name in names} for shard, names in shards.items()},
        last={name: cache.path / name for name in (MANIFEST, ROOT)},
    )


def push_cache(push: CachePush, repository: Repository, *, private: bool, advance: Advance = lambda n: None) -> int:
    """Send what the repository lacks; returns how many shards that were. Each is compared with its checksums first.

    Raises CacheConflict if the repository holds something else, CacheDamaged for a damaged shard, and HubError.
    """
    check_login()
    found = look(repository)
    if found is None:
        found = make(repository, private=private)
    else:
        check_visibility(repository, found, private=private)
    _refuse_other(push, repository, found)
    missing = [shard for shard, files in push.shards.items() if not _is_there(found, files, record_file(shard))]
    card: dict[str, Path | bytes] = {README: push.card.encode()}
    _send(repository, found, {**card, **push.first}, f"Begin cache {push.cache.plan.cache_id}")
    advance(sum(_size(files) for shard, files in push.shards.items() if shard not in missing))
    for batch in _batches(push, missing):
        files = {name: path for shard in batch for name, path in push.shards[shard].items()}
        for shard in batch:
            _refuse_damaged(push.cache, shard)
        commit(repository, files, f"Shards {batch[0]} to {batch[-1]} of {push.cache.plan.n_shards}")
        advance(_size(files))
    _send(repository, found, dict(push.last), f"Cache {push.cache.plan.cache_id} is whole")
    return len(missing)


def _send(repository: Repository, found: Remote, files: dict[str, Path | bytes], message: str) -> None:
    """Commit those of some small files that are not there as they are."""
    data = {name: path if isinstance(path, bytes) else path.read_bytes() for name, path in files.items()}
    changed = {name: files[name] for name, content in data.items() if not _holds(found, name, content)}
    if changed:
        commit(repository, changed, message)


def _holds(found: Remote, name: str, content: bytes) -> bool:
    return name in found.files and found.files[name].holds(content)


def _is_there(found: Remote, files: dict[str, Path], record: str) -> bool:
    """A record comes in one commit with the files that it vouches for."""
    return set(files) <= set(found.files) and found.files[record].holds(files[record].read_bytes())


def _batches(push: CachePush, shards: list[int]) -> Iterator[list[int]]:
    """Shards that go into one commit: enough that a commit is worth its time, few enough to lose little."""
    batch, n_bytes, n_files = [], 0, 0
    for shard in shards:
        files = push.shards[shard]
        if batch and (n_bytes + _size(files) > _COMMIT_BYTES or n_files + len(files) > _COMMIT_FILES):
            yield batch
            batch, n_bytes, n_files = [], 0, 0
        batch.append(shard)
        n_bytes, n_files = n_bytes + _size(files), n_files + len(files)
    if batch:
        yield batch


def _size(files: dict[str, Path]) -> int:
    return sum(path.stat().st_size for path in files.values())


def bytes_to_push(push: CachePush) -> int:
    """Bytes of all shards, which is what `push_cache` tells its `advance` of."""
    return sum(map(_size, push.shards.values()))


def _refuse_damaged(cache: ActivationCache, shard: int) -> None:
    problems = list(check_shard(cache.path, cache.plan, shard, {}))
    if problems:
        raise CacheDamaged(f"{cache.path / problems[0].file} {problems[0].what}; mend the cache, then push it again")


def _refuse_other(push: CachePush, repository: Repository, found: Remote) -> None:
    """A repository may be new, or hold this cache or a part of it, and nothing else."""
    if set(found.files) <= {ATTRIBUTES}:
        return
    known = {ATTRIBUTES, README, *push.files}
    if foreign := sorted(set(found.files) - known):
        raise CacheConflict(
            f"'{repository.name}' is there and holds '{foreign[0]}', which is no file of {push.cache.path}; give "
            "another --repo"
        )
    other = [
        name for name, path in push.first.items() if name in found.files and not _holds(found, name, path.read_bytes())
    ]
    if PLAN not in found.files or other:  # an archive of the same cache has the same plan and other array documents
        raise CacheConflict(
            f"'{repository.name}' is there and holds something else than {push.cache.path}; give another --repo"
        )


def cache_card(cache: ActivationCache, repository: Repository) -> str:
    """The page of a cache on the hub: what it was made from, what it holds, and how to fetch it."""
    plan = cache.plan
    n_bytes = sum(sum(stored_bytes(plan, s, dict(cache.records[s])).values()) for s in cache.shards)
    facts = [
        ("model", _named(plan.model)),
        ("text", _named(plan.source)),
        *(("hook point", f"{hook.tl_name} ({hook.hf_name}), {hook.d_model} wide") for hook in plan.hooks),
        *(("variant", f"{v.name}: {v.kind}, {v.mask_prob:g} by '{v.mask_string}'") for v in plan.variants[1:]),
        ("rows", f"{plan.n_train_rows:,} to train on, {plan.n_rows - plan.n_train_rows:,} held out"),
        ("size", bytes_for_people(n_bytes)),
        ("cache", f"{plan.cache_id}, format {plan.spec_version}{', compressed' if cache.is_archive else ''}"),
    ]
    return "\n".join(
        [
            front_matter({"tags": ["granary", "activations", "sparse-autoencoder"], "viewer": False}),
            "",
            f"# Activations of {plain(plan.model.get('id', 'a model'))}",
            "",
            "A granary cache: a Zarr v3 group of fp16 activations, the same tokens clean and masked, row by row.",
            "",
            table(("what", "value"), facts),
            "",
            "Fetch it with granary, which compares every checksum on arrival and goes on where it was stopped:",
            "",
            "```sh",
            f"python -m cache_spec pull {repository.name} cache.zarr",
            "```",
            "",
        ]
    )


def _named(facts: dict) -> str:
    revision = str(facts.get("revision", ""))
    return f"{facts.get('id', 'unknown')}{f' at {revision[:20]}' if revision else ''}"
