"""What is fuzzed: a true folder is laid out once, and each example changes one file of it and uses the folder.

tests/test_house_fuzz.py tries some examples of each target, and tests/fuzz_guided.py goes on for as long as it is told,
led by coverage.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_fixtures import make_cache, make_plan, scratch
from fuzz_fixtures import Target, bounded, data, document, near, only_user_errors, sealed, spelled
from fuzz_runs import SAE, lay_out_runs
from train_fixtures import DATA

from cache_spec import ActivationCache, Plan
from cache_spec.files import canonical_json
from cache_spec.info import describe, summary
from cache_spec.layout import MANIFEST, PLAN, ROOT, record_file, root_document, zarr_documents
from cache_spec.transcode import transcode
from cache_spec.verify import bytes_to_check, raise_if_not_whole, verdict, verify_cache
from train.loader import MixedBatchLoader


def names() -> list[str]:
    """Every target."""
    return [*_CACHE, *SAE]


def target(name: str, folder: Path) -> Target:
    """A target, with what it needs laid out in a folder the first time."""
    folder.mkdir(exist_ok=True)
    if name in _CACHE:
        if not (folder / "cache").exists():
            make_cache(folder / "cache", make_plan())
            transcode(folder / "cache", folder / "archive")
        return _CACHE[name](folder)
    if not (folder / "runs").exists():
        lay_out_runs(folder)
    return SAE[name](folder)


def use_cache(cache: Path) -> None:
    """Everything that the commands do with a cache that somebody gave us, but for training from it."""
    with only_user_errors():
        bytes_to_check(cache)
        problems = verify_cache(cache)
        json.dumps(verdict(cache, 0, problems))
        raise_if_not_whole(cache, problems)
    for partial in (False, True):
        with only_user_errors():
            opened = ActivationCache.open(cache, allow_partial=partial)
            describe(opened).encode()
            json.dumps(summary(opened))
            for shard in opened.shards:
                opened.column("flags", shard)
                opened.activations("layer_1", "clean", shard)
            opened.moments("layer_1", "masked")


def seal_root(root: Any) -> Any:
    """The root's document, whose own facts alone are sealed."""
    attributes = root.get("attributes") if isinstance(root, dict) else None
    if not isinstance(attributes, dict):
        return root
    return {**root, "attributes": {**attributes, "granary": sealed(attributes.get("granary"))}}


def _of_cache(file: str, seal: Callable[[Any], Any] = sealed) -> Callable[[Path], Target]:
    return lambda folder: document(folder / "cache" / file, lambda: use_cache(folder / "cache"), seal=seal)


def _forged(folder: Path) -> Target:
    """A cache whose every document follows from a plan near ours: what a stranger makes who knows the format."""
    true = json.loads((folder / "cache" / PLAN).read_bytes())

    def use(facts: Any) -> None:
        with scratch() as place, bounded():
            shutil.copytree(folder / "cache", place / "cache")
            forge(place / "cache", facts)
            use_cache(place / "cache")
            with only_user_errors():
                train_from(place / "cache")

    return Target(near(true), use)


def forge(cache: Path, facts: Any) -> None:
    """Put a plan into a cache, and make of the other documents what it says, as far as that is possible."""
    if not isinstance(facts, dict):
        return
    facts = {key: value for key, value in facts.items() if key != "cache_id"}
    facts["cache_id"] = hashlib.sha256(canonical_json(facts)).hexdigest()[:16]
    (cache / PLAN).write_bytes(spelled(facts))
    with only_user_errors():
        plan = Plan.from_json(facts)
        for name, described in zarr_documents(plan).items():
            (cache / name).mkdir(parents=True, exist_ok=True)
            (cache / name / ROOT).write_bytes(spelled(described))
        granary = json.loads((cache / ROOT).read_bytes())["attributes"]["granary"]
        granary = sealed({**granary, "cache_id": plan.cache_id, "status": "partial"})
        (cache / ROOT).write_bytes(spelled(root_document(granary, plan)))
        for shard in range(min(3, plan.n_shards)):
            if not (cache / record_file(shard)).exists():
                continue
            record = json.loads((cache / record_file(shard)).read_bytes())
            record |= {"cache_id": plan.cache_id, "rows": plan.rows_in(shard)}
            (cache / record_file(shard)).write_bytes(spelled(sealed(record)))


def train_from(cache: Path) -> None:
    """Open a cache to train on it, and read a batch."""
    loader = MixedBatchLoader(ActivationCache.open(cache, allow_partial=True), DATA)
    loader.read(0)


def _moments_and_rows(folder: Path) -> Target:
    """Any shard file."""
    return data(folder / "cache/layer_1/clean/c/0/0", lambda: use_cache(folder / "cache"))


def _of_archive(folder: Path) -> Target:
    def use() -> None:
        use_cache(folder / "archive")
        with only_user_errors(), scratch() as place:
            transcode(folder / "archive", place / "out")

    return data(folder / "archive/layer_1/clean/c/1/0", use)


def _of_archive_record(folder: Path) -> Target:
    def use() -> None:
        use_cache(folder / "archive")
        with only_user_errors(), scratch() as place:
            transcode(folder / "archive", place / "out")

    return document(folder / "archive" / record_file(1), use, seal=sealed)


_CACHE: dict[str, Callable[[Path], Target]] = {
    "plan": _of_cache(PLAN),
    "forged plan": _forged,
    "root": _of_cache(ROOT, seal_root),
    "record": _of_cache(record_file(2)),
    "manifest": _of_cache(MANIFEST),
    "zarr.json": _of_cache("layer_1/clean/zarr.json"),
    "activations": _moments_and_rows,
    "archive": _of_archive,
    "archive record": _of_archive_record,
}
