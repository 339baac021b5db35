"""What is fuzzed of runs and SAEs: files of finished, stopped and failed runs, and of other tools."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from cache_fixtures import scratch
from fuzz_fixtures import Target, damaged, data, document, only_user_errors, replacing, sealed, spelled
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import ActivationCache
from cache_spec.files import crc32c
from evaluate.cases import check_run
from evaluate.curves import read_log
from evaluate.kept import read_kept
from evaluate.runs import find_runs, open_caches
from train.card import model_card
from train.checkpoint import append_log, checkpoint_step, last_logged, restore_checkpoint, save_checkpoint
from train.facts import run_facts
from train.foreign import read_folder
from train.formats import dictionary_learning, sparsify
from train.kernels import select
from train.loader import MixedBatchLoader
from train.pushing import Repository, files_to_push, read_report, read_runs
from train.report import print_results
from train.run_folder import FAILED
from train.saelens import config_with
from train.step import TrainRun
from train.sweep import train_sweep

REPORT = {"report_version": "2.1", "l0": 3.0, "metrics": {"core": {"l0": 3.0, "l0_raw": 2.9}}, "profiles": {"x": [1.0]}}
SHORT = replace(DATA, n_tokens=4 * DATA.batch_size)
STOPPED = [run_config("topk", name="stopped"), run_config("topk", name="failed", lr=1e-3)]


def lay_out_runs(folder: Path) -> None:
    """Whole runs with reports, runs to resume, and SAEs of other tools."""
    cache = make_training_cache(folder / "training_cache")
    loader = MixedBatchLoader(cache, DATA)
    train_sweep(loader, [run_config("batchtopk"), run_config("topk")], out=folder / "runs")
    for name in ("batchtopk", "topk"):  # a stranger's checksums fit, or are left out
        path = folder / "runs" / name / "run.json"
        facts = json.loads(path.read_bytes())
        path.write_bytes(spelled({key: value for key, value in facts.items() if key not in ("crc32c", "files")}))
        (folder / "runs" / name / "report.json").write_bytes(spelled(REPORT))
    (folder / "runs/report.json").write_bytes(spelled(REPORT))
    _lay_out_sweep(folder, MixedBatchLoader(cache, SHORT))
    run = TrainRun(run_config(), cache.plan.hooks[0].d_model, loader.n_steps, select("dense", "cpu"))
    (folder / "stopped").mkdir()
    for _ in range(2):
        x = loader.read(run.n_done).clean
        run.step(x, x)
        append_log(folder / "stopped", {"step": run.n_done})
        save_checkpoint(folder / "stopped", run)
    for name, tool in (("dictionary_learning", dictionary_learning), ("sparsify", sparsify)):
        made = tool.write(read_folder(folder / "runs/topk"))
        (folder / name).mkdir()
        for file, content in made.files.items():
            (folder / name / file).write_bytes(content)
    shutil.copytree(folder / "runs/batchtopk", folder / "saelens")
    (folder / "saelens/run.json").unlink()


def _lay_out_sweep(folder: Path, loader: MixedBatchLoader) -> None:
    """A run that has two steps to go, and one that failed; without checksums, which a stranger leaves out."""
    kernel = select("dense", "cpu")
    for config in STOPPED:
        facts = run_facts(config, loader, kernel)
        if config.name == "failed":
            facts |= {"status": FAILED, "failure": {"step": 2, "reason": "its loss is nan", "checkpoint": 1}}
        (folder / "sweep" / config.name).mkdir(parents=True)
        (folder / "sweep" / config.name / "run.json").write_bytes(spelled(facts))
    run = TrainRun(STOPPED[0], loader.hook.d_model, loader.n_steps, kernel)
    for _ in range(2):
        x = loader.read(run.n_done).clean
        run.step(x, x)
    save_checkpoint(folder / "sweep/stopped", run)


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
        path, runs = folder / "runs" / file, folder / "runs"
        kind = document if file.endswith(".json") else data
        return kind(path, lambda: (use_runs(runs), use_sae(runs / "batchtopk"))[0])

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


def _resumed_sweep(folder: Path) -> None:
    with only_user_errors(), scratch() as place, redirect_stdout(io.StringIO()):
        shutil.copytree(folder / "sweep", place / "runs")
        loader = MixedBatchLoader(ActivationCache.open(folder / "training_cache"), SHORT)
        facts = train_sweep(loader, STOPPED, out=place / "runs", kernel="dense", resume=True)
        print_results(facts, place / "runs")


def _of_stopped(run: str) -> Callable[[Path], Target]:
    return lambda folder: document(folder / "sweep" / run / "run.json", lambda: _resumed_sweep(folder))


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


SAE: dict[str, Callable[[Path], Target]] = {
    "run.json": _of_run("batchtopk/run.json"),
    "cfg.json": _of_run("batchtopk/cfg.json"),
    "weights": _of_run("batchtopk/sae_weights.safetensors"),
    "log": _of_run("batchtopk/log.jsonl"),
    "report.json": _of_run("batchtopk/report.json"),
    "report.json of all runs": _of_run("report.json"),
    "SAELens's cfg.json": _of_sae("saelens/cfg.json"),
    "dictionary_learning's config.json": _of_sae("dictionary_learning/config.json"),
    "dictionary_learning's ae.pt": _of_sae("dictionary_learning/ae.pt"),
    "sparsify's cfg.json": _of_sae("sparsify/cfg.json"),
    "sparsify's weights": _of_sae("sparsify/sae.safetensors"),
    "run.json of a stopped run": _of_stopped("stopped"),
    "run.json of a failed run": _of_stopped("failed"),
    "checkpoint": _of_checkpoint("state/step_000000002.json"),
    "checkpoint's tensors": _forged_checkpoint,
    "log of a stopped run": _of_checkpoint("log.jsonl"),
}
