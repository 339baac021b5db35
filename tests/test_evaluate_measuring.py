"""Measuring: every metric and control on the embedded model, and what others need of a local one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_fixtures import make_plan, make_shard
from evaluate_fixtures import no_model, small_cache, small_sae, write_run
from harvest_fixtures import save_model, write_text
from safetensors.torch import load_file
from typer.testing import CliRunner

from cache_spec import ActivationCache, create_cache, finalize_cache, write_shard
from cache_spec.hook_point import HookPoint
from evaluate import cases, measuring
from evaluate.command import choose_metrics, run
from evaluate.measuring import Asked, measure
from evaluate.metrics.stability import stability
from evaluate.runs import find_runs
from evaluate.text_sources import TextSources
from harvest import embedded
from harvest.__main__ import app as harvest
from harvest.model import activations, load_model


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Three seeds, unmasked and masked, of a model that cannot be had."""
    no_model(monkeypatch)
    cache = small_cache(tmp_path / "cache")
    for seed in range(3):
        write_run(tmp_path / "runs", cache, small_sae(seed), seed=seed)
    write_run(tmp_path / "runs", cache, small_sae(9), seed=0, masked=0.5)
    return tmp_path / "runs"


def subjects_of(runs: Path, monkeypatch: pytest.MonkeyPatch, metrics: str) -> dict[tuple[str, int], list]:
    """(recipe, seed) -> [subject] of every case that is measured."""
    seen: dict[tuple[str, int], list] = {}
    real = measuring._measure_case

    def watched(case, chosen, missing):
        subject = case.make()
        seen.setdefault((case.recipe.name, case.seed), []).append(subject)
        return real(replace(case, make=lambda: subject), chosen, missing)

    monkeypatch.setattr(measuring, "_measure_case", watched)
    asked = Asked(metrics=choose_metrics(metrics), device="cpu", seed=4, out=runs, fresh=True)
    measure(find_runs(runs)[0], asked)
    return seen


def test_peers_are_the_decoders_of_the_other_seeds(runs, monkeypatch):
    seen = subjects_of(runs, monkeypatch, "stability")
    decoders = {
        seed: load_file(next(runs.glob(f"*unmasked_seed{seed}")) / "sae_weights.safetensors")["W_dec"]
        for seed in range(3)
    }
    (subject,) = seen["unmasked", 1]
    assert len(subject.peers) == 2
    assert all(torch.equal(peer, decoders[seed]) for peer, seed in zip(subject.peers, (0, 2), strict=True))
    (alone,) = seen["masked 0.5", 0]
    assert alone.peers == ()
    (random,) = seen["random, L0 matched", 0]
    assert len(random.peers) == 1  # of controls there are two seeds
    assert not any(torch.equal(peer, random.dictionary.directions) for peer in random.peers)
    assert {subject.seed for found in seen.values() for subject in found} == {4}
    monkeypatch.setattr(cases, "MOST_PEERS", 1)
    (subject,) = subjects_of(runs, monkeypatch, "stability")["unmasked", 1]
    assert len(subject.peers) == 1
    assert 0 < stability(subject)["stability"] < 1


def test_decoders_of_other_seeds_are_not_read_for_nothing(runs, monkeypatch):
    seen = subjects_of(runs, monkeypatch, "core")
    assert all(subject.peers == () for found in seen.values() for subject in found)


def test_a_metric_without_what_it_needs_is_named_once(runs, tmp_path):
    for folder in runs.glob("*unmasked_seed[12]"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    asked = Asked(metrics=choose_metrics("core,stability,absorption,probing"), device="cpu", seed=0, out=tmp_path)
    found = measure(find_runs(runs)[0], asked)
    for name in ("stability", "absorption", "probing"):
        assert sum(text.startswith(f"{name} is not measured: it ") for text in found.missing) == 1
    assert not any(text.startswith("core") for text in found.missing)


def test_a_local_model_gets_loss_columns_from_the_caches_held_out_windows(tmp_path):
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt", 400)
    arguments = ["--model", model, "--dataset", text, "--layers", "1", "--tokens", "6k", "--context", "32"]
    arguments += ["--held-out", "0.3", "--scale-factor", "1", "--out", tmp_path / "cache"]
    assert CliRunner().invoke(harvest, [str(argument) for argument in arguments]).exit_code == 0
    opened = ActivationCache.open(tmp_path / "cache")
    write_run(tmp_path / "runs", opened, small_sae(0, d_model=16, d_sae=64))
    run(tmp_path / "runs", out=tmp_path / "runs", metrics="core,recovery")
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert any("ground truth" in sentence for sentence in report["missing"])
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
    """An untrained SAE, called trained, on a small cache of the embedded model."""
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
    write_run(folder / "runs", opened, small_sae(5, loaded.d_model, 64), seed=0)
    return folder / "runs"


def test_the_embedded_model_gets_every_metric_and_all_controls(tiny_runs, monkeypatch):
    monkeypatch.setattr("evaluate.generated_text.N_DOCUMENTS", {"fit": 200, "test": 200, "shifted": 200})
    monkeypatch.setattr("evaluate.generated_text.N_EVERYWHERE", 3000)
    monkeypatch.setattr("evaluate.masked_language.N_DOCUMENTS", 60)
    monkeypatch.setattr("evaluate.windows.N_SPLICE_WINDOWS", 10)
    run(tiny_runs, out=tiny_runs)
    report = json.loads((tiny_runs / "report.json").read_text())
    by_kind = {r["kind"]: {name: v["mean"] for name, v in r["metrics"].items()} for r in report["recipes"]}
    kinds = ("trained", "random, L0 matched", "permuted decoder", "untrained", "oracle")
    assert tuple(by_kind) == kinds
    oracle, trained = by_kind["oracle"], by_kind["trained"]
    not_measured = {text.partition(" is not measured")[0] for text in report["missing"]}
    for metric in choose_metrics(""):
        assert metric.columns.keys() & trained.keys() or metric.name in not_measured, metric.name
    assert oracle["mcc"] == pytest.approx(1.0, abs=1e-4)
    assert oracle["mean_full_absorption_score"] == 0.0
    assert trained["ce_loss_with_ablation"] > trained["ce_loss_without_sae"]
    assert json.loads(next(tiny_runs.glob("*/report.json")).read_text())["example"]["bars"]
    assert {run["path"] for run in report["runs"]} == {None, *(folder.name for folder in tiny_runs.glob("batchtopk*"))}


def test_text_of_the_user_is_probed_and_passed_over_by_the_oracle(tiny_runs, tmp_path, monkeypatch):
    """The oracle reads labels, and text of the user has none: it averages over the tasks of the labelled text."""
    monkeypatch.setattr("evaluate.generated_text.N_DOCUMENTS", {"fit": 60, "test": 60, "shifted": 40})
    monkeypatch.setattr("evaluate.generated_text.N_EVERYWHERE", 500)
    monkeypatch.setattr("evaluate.generated_text.PROBE_ROWS", 150)
    stream = embedded.documents(seed=5)
    rows = [
        {"text": next(stream), "label": i % 2, "split": ("train", "train", "test", "ood")[i // 2 % 4]}
        for i in range(120)
    ]
    (tmp_path / "parity.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = TextSources(probe_data=(tmp_path / "parity.jsonl",))
    run(tiny_runs, out=tmp_path / "out", metrics="probing,ood", sources=sources)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    by_kind = {case["kind"]: case["metrics"] for case in report["runs"]}
    for name in ("sae_top_1_test_auc", "ood_gap_to_dense_16"):
        assert f"{name}@parity" in by_kind["trained"]
        assert f"{name}@parity" not in by_kind["oracle"]
        tasks = [value for key, value in by_kind["oracle"].items() if key.startswith(f"{name}@")]
        assert by_kind["oracle"][name] == pytest.approx(np.mean(tasks))


def test_what_seeds_vary_is_read_from_the_runs(runs, monkeypatch):
    asked = Asked(metrics=choose_metrics("core"), device="cpu", seed=0, out=runs)
    found, _ = find_runs(runs)
    assert not measure(found, asked).order_varies
    ordered = [replace(run, data_seed=run.seed) for run in found]
    assert measuring._order_varies(ordered)
    assert not measuring._order_varies([replace(run, data_seed=min(run.seed, 1)) for run in found])
    assert not measuring._order_varies(ordered[:1])


def test_first_letters_of_a_small_model_come_with_their_guard(runs, monkeypatch):
    real = measuring.make_bench

    def with_spelling(*arguments, **how):
        return replace(real(*arguments, **how), spelling=object())

    monkeypatch.setattr(measuring, "make_bench", with_spelling)
    chosen = [replace(metric, measure=lambda _: {}) for metric in choose_metrics("first_letter")]
    measured = measure(find_runs(runs)[0], Asked(metrics=chosen, device="cpu", seed=0, out=runs))
    (caution,) = measured.cautions
    assert "first-letter absorption means little here" in caution
