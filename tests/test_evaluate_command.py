"""The command: from folders of runs to reports, and one sentence for everything that can be wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_fixtures import make_plan, make_shard
from evaluate_fixtures import write_run
from harvest_fixtures import save_model, write_text
from typer.testing import CliRunner

from cache_spec import ActivationCache, CacheError, CacheNotFound, UserError, create_cache, finalize_cache, write_shard
from cache_spec.hook_point import HookPoint
from evaluate import bench, measuring
from evaluate.__main__ import app
from evaluate.command import choose_metrics, run
from evaluate.names import available
from evaluate.runs import RunsIncomplete, find_runs, open_cache
from harvest import embedded
from harvest.__main__ import app as harvest
from harvest.model import activations, load_model
from train.activations import Threshold
from train.sae import SparseAutoencoder, initialise

D_MODEL = 6


def small_sae(seed: int, d_model: int = D_MODEL, d_sae: int = 16) -> SparseAutoencoder:
    sae = SparseAutoencoder(d_model, d_sae, Threshold())
    initialise(sae, seed, entries="normal", norm=1.0)
    sae.threshold = torch.tensor(0.1)
    return sae


@pytest.fixture
def cache(tmp_path) -> ActivationCache:
    plan = make_plan(n_rows=256, n_train_rows=64)
    create_cache(tmp_path / "cache", plan)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        columns["flags"] = np.ones(plan.rows_in(shard), dtype=np.uint8)
        write_shard(tmp_path / "cache", plan, shard, values, columns)
    finalize_cache(tmp_path / "cache")
    return ActivationCache.open(tmp_path / "cache")


@pytest.fixture
def runs(tmp_path, cache, monkeypatch) -> Path:
    """Two seeds, masked and not, on a made-up cache whose model cannot be had."""

    had = bench.load_model

    def unreachable(name: str, **options: Any) -> Any:
        if name != bench.EMBEDDED_MODEL:  # that one comes with the checkout
            raise UserError(f"'{name}' cannot be had")
        return had(name, **options)

    monkeypatch.setattr(bench, "load_model", unreachable)
    for seed in range(2):
        for masked in (0.0, 0.5):
            write_run(tmp_path / "runs", cache, small_sae(seed + 10 * (masked > 0)), seed=seed, masked=masked)
    return tmp_path / "runs"


def evaluate(folder: Path, **options: object) -> None:
    run(folder, **{"metrics": "", "cache": None, "device": "cpu", "out": folder, "seed": 0, **options})


def test_another_models_cache_gets_core_numbers_and_says_what_is_missing(runs, capsys):
    evaluate(runs)
    printed = capsys.readouterr().out
    assert "columns that need the model" in printed
    assert "'made-up' cannot be had" in printed
    assert "ground truth" in printed
    report = json.loads((runs / "report.json").read_text())
    assert [(r["recipe"], r["kind"]) for r in report["recipes"]] == [
        ("unmasked", "trained"),
        ("masked 0.5", "trained"),
        ("untrained", "untrained"),
    ]
    assert len(report["missing"]) == 2
    assert report["sentence"].startswith("Over 2 seeds, 'masked 0.5' changed explained variance of batchtopk")
    assert "mcc" not in report["recipes"][0]["metrics"]
    for folder in runs.glob("batchtopk*"):
        mine = json.loads((folder / "report.json").read_text())
        nested = mine["eval_result_metrics"]
        assert nested["sparsity"]["l0"] == mine["metrics"]["core"]["l0"] == pytest.approx(3, abs=0.7)
        assert nested["reconstruction_quality"]["explained_variance"] == mine["metrics"]["core"]["explained_variance"]
        assert mine["threshold"]["trained"] == pytest.approx(0.1)
        assert mine["missing"] == report["missing"]
    assert "Not measured" in (runs / "report.html").read_text()


def test_a_rerun_measures_again_and_gives_the_same(runs):
    evaluate(runs)
    first = json.loads((runs / "report.json").read_text())
    for file in runs.glob("*/report.json"):
        file.write_text("{}")
    evaluate(runs)
    assert json.loads((runs / "report.json").read_text()) == first
    assert all("metrics" in json.loads(file.read_text()) for file in runs.glob("*/report.json"))


def test_one_run_alone_can_be_measured(runs):
    one = next(runs.glob("*unmasked_seed0"))
    evaluate(one, metrics="core")
    mine = json.loads((one / "report.json").read_text())
    assert mine["run"] == one.name  # its own report, not the one over all runs
    assert (one / "report.html").exists()
    evaluate(one, metrics="core", out=one.parent)
    assert json.loads((one.parent / "report.json").read_text())["runs"][0]["run"] == one.name


def test_an_out_that_is_or_is_under_a_file_is_said_before_measuring(runs, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file"):
            evaluate(runs, metrics="core", out=out)
    assert not list(runs.glob("*/report.json"))


def test_an_unfinished_run_is_left_out_aloud(runs, capsys):
    half = next(runs.glob("*masked_0.5_seed1"))
    facts = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps({**facts, "status": "training"}))
    with pytest.raises(RunsIncomplete, match="1 of 4 runs") as caught:
        evaluate(runs, metrics="core")
    assert caught.value.exit_code == 1
    assert f"left out {half.name}" in capsys.readouterr().out
    report = json.loads((runs / "report.json").read_text())
    assert half.name not in {r["run"] for r in report["runs"]}
    assert any(half.name in text for text in report["missing"])
    assert not (half / "report.json").exists()


def test_failed_runs_and_transcoders_are_left_out_aloud_each_with_its_reason(runs, capsys):
    failed, transcoder, *_ = sorted(runs.glob("*/run.json"))
    facts = json.loads(failed.read_text())
    failure = {"step": 312, "reason": "its loss is nan", "checkpoint": 300}
    failed.write_text(json.dumps({**facts, "status": "failed", "failure": failure}))
    facts = json.loads(transcoder.read_text())
    transcoder.write_text(json.dumps({**facts, "data": {**facts.get("data", {}), "target_hook": "layer_3"}}))
    with pytest.raises(RunsIncomplete, match="2 of 4 runs") as caught:
        evaluate(runs, metrics="core")
    assert "failed at step 312 (its loss is nan" in str(caught.value)
    assert f"left out {transcoder.parent.name}: a transcoder" in capsys.readouterr().out
    report = json.loads((runs / "report.json").read_text())
    assert len(report["missing"]) >= 2
    assert {failed.parent.name, transcoder.parent.name}.isdisjoint(run["run"] for run in report["runs"])


def test_the_report_can_go_elsewhere(runs, tmp_path):
    evaluate(runs, metrics="core", out=tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place" / "report.html").exists()
    assert not (runs / "report.html").exists()


def test_ctrl_c_keeps_the_reports_of_finished_runs(runs, monkeypatch):
    load, seen = measuring.load_run, []

    def interrupted(path, device):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(path)
        return load(path, device)

    monkeypatch.setattr(measuring, "load_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(runs, metrics="core")
    assert {file.parent for file in runs.glob("*/report.json")} == set(seen)
    assert not list(runs.rglob("*.partial"))
    assert not (runs / "report.json").exists()


def test_a_moved_cache_is_found_with_the_option_and_asked_for_without(runs, cache, tmp_path):
    moved = shutil.move(cache.path, tmp_path / "elsewhere")
    with pytest.raises(CacheNotFound, match=r"trained on .*cache.*--cache"):
        evaluate(runs)
    evaluate(runs, metrics="core", cache=Path(moved))
    assert (runs / "report.json").exists()


def test_another_cache_in_its_place_is_refused(runs, tmp_path):
    other = make_plan(n_rows=128, n_train_rows=64, seed=9)
    create_cache(tmp_path / "other", other)
    for shard in range(other.n_shards):
        write_shard(tmp_path / "other", other, shard, *make_shard(other, shard))
    finalize_cache(tmp_path / "other")
    with pytest.raises(CacheError, match="was trained on"):
        open_cache(find_runs(runs)[0][0], tmp_path / "other")


def test_bad_folders_get_one_sentence_each(tmp_path, runs):
    with pytest.raises(UserError, match="there is no folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path / "empty")
    for file in runs.glob("*/run.json"):
        file.write_text(json.dumps({"status": "training"}))
    with pytest.raises(RunsIncomplete, match="--resume") as caught:
        find_runs(runs)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"status": "complete"}', '{"status": "complete", "config": 3, "cache": {}}']
)
def test_a_mangled_run_file_is_named(runs, text):
    file = next(runs.glob("*/run.json"))
    file.write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        find_runs(runs)


def test_runs_that_differ_in_another_setting_are_not_taken_for_seeds(runs):
    """Two learning rates in one folder: each has its own baseline, and the labels say which is which."""
    for file in runs.glob("*/run.json"):
        facts = json.loads(file.read_text())
        for lr in (0.001, 0.0003):
            other = shutil.copytree(file.parent, file.parent.with_name(f"{file.parent.name}_lr{lr}"))
            config = {**facts["config"], "lr": lr, "penalties": ["auxk=0.1"]}
            (other / "run.json").write_text(json.dumps({**facts, "name": other.name, "config": config}))
        shutil.rmtree(file.parent)
    evaluate(runs, metrics="core")
    report = json.loads((runs / "report.json").read_text())
    trained = [r for r in report["recipes"] if r["kind"] == "trained"]
    assert sorted((r["recipe"], r["settings"]) for r in trained) == [
        ("masked 0.5", "lr 0.0003"),
        ("masked 0.5", "lr 0.001"),
        ("unmasked", "lr 0.0003"),
        ("unmasked", "lr 0.001"),
    ]
    assert all(r["metrics"]["l0"]["n_seeds"] == 2 for r in trained)
    assert all(d["settings"] == d["baseline"]["settings"] for d in report["differences"])


def test_penalties_that_vary_and_positions_of_masked_runs_are_named(runs):
    for number, file in enumerate(sorted(runs.glob("*/run.json"))):
        facts = json.loads(file.read_text())
        facts["config"]["penalties"] = [f"l1=0.0{number}"]
        facts["data"]["positions"] = "drop_masked"
        file.write_text(json.dumps(facts))
    found, _ = find_runs(runs)
    assert sorted(run.settings for run in found) == ["l1=0.00", "l1=0.01", "l1=0.02", "l1=0.03"]
    assert {run.recipe for run in found} == {"unmasked", "masked 0.5, drop_masked"}


def test_a_device_that_is_not_there_is_one_sentence(runs):
    with pytest.raises(UserError, match="--device meta7 cannot be used here"):
        evaluate(runs, device="meta7")


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(
        UserError, match="there is no metric 'fancy'; there are absorption, core, ood, probing, recovery"
    ):
        choose_metrics("core,fancy")
    with pytest.raises(UserError, match="names nothing"):
        choose_metrics(" , ")
    assert [metric.name for metric in choose_metrics("probing, core,core")] == ["core", "probing"]


def test_help_explains_every_option():
    text = CliRunner().invoke(app, ["--help"]).output
    for option in ("--metrics", "--cache", "--device", "--out", "--seed"):
        assert option in text
    for metric in available():
        assert metric in text


def test_a_local_model_gets_loss_columns_from_the_caches_held_out_windows(tmp_path, capsys):
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt", 400)
    arguments = ["--model", model, "--dataset", text, "--layers", "1", "--tokens", "6k", "--context", "32"]
    arguments += ["--held-out", "0.3", "--scale-factor", "1", "--out", tmp_path / "cache"]
    assert CliRunner().invoke(harvest, [str(argument) for argument in arguments]).exit_code == 0
    opened = ActivationCache.open(tmp_path / "cache")
    write_run(tmp_path / "runs", opened, small_sae(0, d_model=16, d_sae=64))
    evaluate(tmp_path / "runs")
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert len(report["missing"]) == 1
    assert "ground truth" in report["missing"][0]
    (trained,) = [r["metrics"] for r in report["recipes"] if r["kind"] == "trained"]
    windows = torch.from_numpy(
        np.load(tmp_path / "cache" / "_granary" / "windows.npy")[opened.plan.n_train_windows :].astype(np.int64)
    )
    loaded = load_model(str(model))
    expected = float(loaded.model(input_ids=windows, labels=windows).loss)
    assert trained["ce_loss_without_sae"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert trained["kl_div_with_sae"]["mean"] > 0
    assert "explained_variance_unreplaced" in trained


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory) -> Path:
    """Untrained SAEs of three recipes on a small cache of the embedded model."""
    folder = tmp_path_factory.mktemp("tiny")
    loaded, hook_point = load_model("tiny"), HookPoint.parse(embedded.HOOK_POINT)
    tokens = torch.from_numpy(embedded.generate(12, seed=1).tokens)
    x = activations(loaded, tokens, [hook_point])[hook_point][:, 1:].reshape(-1, loaded.d_model).numpy()
    plan = make_plan(n_rows=704, n_train_rows=64, d_model=loaded.d_model, layers=(hook_point.layer,))
    plan = replace(plan, model={**plan.model, "id": "tiny", "revision": loaded.revision})
    create_cache(folder / "cache", plan)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        rows = x[64 * shard : 64 * shard + 64].astype("<f2")
        columns["flags"] = np.ones(plan.rows_in(shard), dtype=np.uint8)
        write_shard(folder / "cache", plan, shard, dict.fromkeys(values, rows), columns)
    finalize_cache(folder / "cache")
    opened = ActivationCache.open(folder / "cache")
    for seed in range(2):
        write_run(folder / "runs", opened, small_sae(seed, loaded.d_model, 128), seed=seed)
        write_run(folder / "runs", opened, small_sae(seed + 5, loaded.d_model, 128), seed=seed, masked=0.5)
    return folder / "runs"


def test_the_embedded_model_gets_every_metric_and_all_controls(tiny_runs, monkeypatch, capsys):
    monkeypatch.setattr(bench, "N_DOCUMENTS", {"fit": 250, "test": 250, "shifted": 250})
    monkeypatch.setattr(bench, "N_EVERYWHERE", 3000)
    monkeypatch.setattr(bench, "N_SPLICE_WINDOWS", 10)
    evaluate(tiny_runs)
    report = json.loads((tiny_runs / "report.json").read_text())
    assert report["missing"] == []
    by_kind = {r["kind"]: {name: v["mean"] for name, v in r["metrics"].items()} for r in report["recipes"]}
    oracle, trained = by_kind["oracle"], by_kind["trained"]
    expected = {name for metric in choose_metrics("") for name in metric.columns if not name.startswith("recall_gap")}
    assert expected <= set(trained)
    assert oracle["mcc"] == pytest.approx(1.0, abs=1e-4)
    assert oracle["sae_top_1_test_auc_shifted"] == pytest.approx(1.0)
    assert oracle["mean_full_absorption_score"] == 0.0
    assert trained["mcc"] < 0.6
    assert trained["ce_loss_with_ablation"] > trained["ce_loss_without_sae"]
    page = (tiny_runs / "report.html").read_text()
    for section in ("A worked example", "Probing on the usual", "seed by seed", "What each recipe changes"):
        assert section in page
    assert "Over 2 seeds, 'masked 0.5' changed cross-token absorption" in capsys.readouterr().out
