"""What is fuzzed: a true folder is laid out once, and each example changes one file of it and uses the folder.

tests/test_house_fuzz.py tries some examples of each target, and tests/fuzz_guided.py goes on for as long as it is told,
led by coverage.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cache_fixtures import make_cache, make_plan, scratch
from fuzz_fixtures import bounded, damaged, near, only_user_errors, sealed, spelled
from hypothesis import strategies as st
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import ActivationCache, Plan
from cache_spec.files import canonical_json, crc32c
from cache_spec.info import describe, summary
from cache_spec.layout import MANIFEST, PLAN, ROOT, record_file, root_document, zarr_documents
from cache_spec.transcode import transcode
from cache_spec.verify import bytes_to_check, raise_if_not_whole, verdict, verify_cache
from evaluate.cases import check_run
from evaluate.curves import read_log
from evaluate.kept import read_kept
from evaluate.runs import find_runs, open_caches
from train.card import model_card
from train.checkpoint import append_log, checkpoint_step, last_logged, restore_checkpoint, save_checkpoint
from train.foreign import read_folder
from train.formats import dictionary_learning, sparsify
from train.kernels import select
from train.loader import MixedBatchLoader
from train.pushing import Repository, files_to_push, read_report, read_runs
from train.saelens import config_with
from train.step import TrainRun
from train.sweep import train_sweep


@dataclass(frozen=True)
class Target:
    """What is drawn, and what is done with it; anything but a UserError is a fault of ours."""

    drawn: st.SearchStrategy[Any]
    use: Callable[[Any], None]


def names() -> list[str]:
    """Every target."""
    return [*_CACHE, *_SAE]


def target(name: str, folder: Path) -> Target:
    """A target, with what it needs laid out in a folder the first time."""
    folder.mkdir(exist_ok=True)
    if name in _CACHE:
        if not (folder / "cache").exists():
            make_cache(folder / "cache", make_plan())
            transcode(folder / "cache", folder / "archive")
        return _CACHE[name](folder)
    if not (folder / "runs").exists():
        _lay_out_runs(folder)
    return _SAE[name](folder)


def replacing(path: Path, use: Callable[[], None]) -> Callable[[bytes], None]:
    """Use a folder while one of its files holds something else."""
    true = path.read_bytes()

    def with_data(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with bounded():
                use()
        finally:
            path.write_bytes(true)

    return with_data


def document(path: Path, use: Callable[[], None], *, seal: Callable[[Any], Any] = lambda facts: facts) -> Target:
    """A JSON file: near what it says, sealed or not, or its bytes damaged."""
    replace = replacing(path, use)
    drawn = near(json.loads(path.read_bytes()))
    return Target(drawn.map(spelled) | drawn.map(seal).map(spelled) | damaged(path.read_bytes()), replace)


def data(path: Path, use: Callable[[], None]) -> Target:
    """A file of bytes."""
    return Target(damaged(path.read_bytes()), replacing(path, use))


# --- caches


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


# --- runs and SAEs


def _lay_out_runs(folder: Path) -> None:
    cache = make_training_cache(folder / "training_cache")
    loader = MixedBatchLoader(cache, DATA)
    train_sweep(loader, [run_config("batchtopk"), run_config("topk")], out=folder / "runs")
    for name in ("batchtopk", "topk"):  # a stranger's checksums fit, or are left out
        path = folder / "runs" / name / "run.json"
        facts = json.loads(path.read_bytes())
        path.write_bytes(spelled({key: value for key, value in facts.items() if key not in ("crc32c", "files")}))
    run = TrainRun(run_config(), cache.plan.hooks[0].d_model, loader.n_steps, select("dense", "cpu"))
    (folder / "stopped").mkdir()
    for _ in range(2):
        x = loader.read(run.n_done).clean
        run.step(x, x)
        append_log(folder / "stopped", {"step": run.n_done}) if (folder / "stopped").mkdir(
            exist_ok=True
        ) is None else None
        save_checkpoint(folder / "stopped", run)
    for name, tool in (("dictionary_learning", dictionary_learning), ("sparsify", sparsify)):
        made = tool.write(read_folder(folder / "runs/topk"))
        (folder / name).mkdir()
        for file, content in made.files.items():
            (folder / name / file).write_bytes(content)
    shutil.copytree(folder / "runs/batchtopk", folder / "saelens")
    (folder / "saelens/run.json").unlink()


def use_sae(folder: Path) -> None:
    """What import, export and evaluate do with an SAE that somebody gave us."""
    with only_user_errors():
        stored = read_folder(folder)
        config_with(stored.sae, stored.metadata)
        for tool in (dictionary_learning, sparsify):
            with only_user_errors():
                made = tool.write(stored, **({"approximate": True} if tool is sparsify else {}))
                assert (Path("/out") / made.subfolder).is_relative_to("/out")
                assert ".." not in Path(made.subfolder).parts
        stored.sae(torch.zeros(1, stored.sae.d_model))


def use_runs(folder: Path) -> None:
    """What evaluate and push do with runs that somebody gave us."""
    with only_user_errors():
        runs, left_out = find_runs(folder)
        caches = open_caches(runs, None, left_out)
        for run in runs:
            read_log(run.path)
            last_logged(run.path)
            read_kept(run.path / "report.json", "")
            if run.cache_id in caches:
                with only_user_errors():
                    check_run(run, caches[run.cache_id].hook(run.hook))
    with only_user_errors():
        found = read_runs(folder)
        files = files_to_push(found, read_report(folder), model_card(found, Repository(name="a/b", kind="model")))
        assert not any(name.startswith("/") or ".." in Path(name).parts for name in files)


def _of_run(file: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        path, runs = folder / "runs/batchtopk" / file, folder / "runs"
        kind = document if file.endswith(".json") else data
        return kind(path, lambda: (use_runs(runs), use_sae(path.parent))[0])

    return make


def _of_sae(file: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        path = folder / file
        return (document if file.endswith(".json") else data)(path, lambda: use_sae(path.parent))

    return make


def _resumed(folder: Path) -> None:
    with only_user_errors(), scratch() as place:
        shutil.copytree(folder / "stopped", place / "run")
        run = TrainRun(run_config(), 8, 60, select("dense", "cpu"))
        checkpoint_step(place / "run")
        restore_checkpoint(place / "run", run)
        last_logged(place / "run")
        x = torch.zeros(4, 8)
        run.step(x, x)


def _of_checkpoint(file: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        path = folder / "stopped" / file
        kind = document if file.endswith(".json") else data
        return kind(path, lambda: _resumed(folder))

    return make


def _forged_checkpoint(folder: Path) -> Target:
    """Tensors with a checksum that fits them."""
    path = folder / "stopped/state/step_000000002.safetensors"
    facts = json.loads(path.with_suffix(".json").read_bytes())
    true = spelled(facts)

    def use(tensors: bytes) -> None:
        sound = sealed({**facts, "n_bytes": len(tensors), "tensors_crc32c": f"{crc32c(tensors):08x}"})
        path.with_suffix(".json").write_bytes(spelled(sound))
        try:
            replacing(path, lambda: _resumed(folder))(tensors)
        finally:
            path.with_suffix(".json").write_bytes(true)

    return Target(damaged(path.read_bytes()), use)


_SAE: dict[str, Callable[[Path], Target]] = {
    "run.json": _of_run("run.json"),
    "cfg.json": _of_run("cfg.json"),
    "weights": _of_run("sae_weights.safetensors"),
    "log": _of_run("log.jsonl"),
    "SAELens's cfg.json": _of_sae("saelens/cfg.json"),
    "dictionary_learning's config.json": _of_sae("dictionary_learning/config.json"),
    "dictionary_learning's ae.pt": _of_sae("dictionary_learning/ae.pt"),
    "sparsify's cfg.json": _of_sae("sparsify/cfg.json"),
    "sparsify's weights": _of_sae("sparsify/sae.safetensors"),
    "checkpoint": _of_checkpoint("state/step_000000002.json"),
    "checkpoint's tensors": _forged_checkpoint,
    "log of a stopped run": _of_checkpoint("log.jsonl"),
}
