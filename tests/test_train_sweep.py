"""Sweeps: one read for all, resuming to the bit, and folders that never look more complete than they are."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import DiskFull, UserError
from train import sweep
from train.__main__ import app
from train.checkpoint import append_log, restore_checkpoint, save_checkpoint
from train.kernels import select
from train.loader import MixedBatchLoader
from train.run_folder import COMPLETE, load_run
from train.step import TrainRun
from train.sweep import Unfinished, train_sweep

ROOT = Path(__file__).parent.parent
RUNS = [
    run_config("batchtopk"),
    run_config("matryoshka", name="masked", masked_fraction=0.3),
    run_config("topk", name="noisy", corrupt="gaussian=0.3"),
    run_config("jumprelu", name="dropped", corrupt="dropout=0.2", masked_fraction=0.5),
    run_config("standard"),
]
EVERY = 7


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("sweep") / "cache")


@pytest.fixture
def loader(cache):
    return MixedBatchLoader(cache, DATA)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The sweep, trained without interruption."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    train_sweep(MixedBatchLoader(cache, DATA), RUNS, out=out, checkpoint_every=EVERY)
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Every file; without the commit, for somebody may commit while the tests run."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: re.sub(rb'"git_commit": "\w+"', b"", data) for name, data in found.items()}


def train_until(step: int, loader: MixedBatchLoader, runs, out: Path) -> None:
    """Train, resuming if need be, and be interrupted while this step's rows are read."""
    read = MixedBatchLoader.read

    def stop(self, at, **how):
        if at == step:
            raise KeyboardInterrupt
        return read(self, at, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedBatchLoader, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            train_sweep(loader, runs, out=out, checkpoint_every=EVERY, resume=True)


@pytest.mark.parametrize("steps", [[20], [3], [14, 15, 16, 50]])
def test_a_resumed_sweep_ends_as_if_it_had_never_stopped(steps, whole, loader, tmp_path):
    """Weights, thresholds, logs and run.json, byte for byte; with all controls, AuxK and both kinds of threshold."""
    for step in steps:
        train_until(step, loader, RUNS, tmp_path / "runs")
        statuses = {json.loads(path.read_text())["status"] for path in (tmp_path / "runs").glob("*/run.json")}
        assert statuses == {"training"}
        assert not list((tmp_path / "runs").glob("*/cfg.json"))
    train_sweep(loader, RUNS, out=tmp_path / "runs", checkpoint_every=EVERY, resume=True)
    assert contents(tmp_path / "runs") == contents(whole)


def test_runs_that_stopped_at_different_steps_go_on_from_where_each_was(whole, loader, tmp_path):
    for out, step in (("early", 10), ("late", 40)):
        train_until(step, loader, RUNS, tmp_path / out)
    (tmp_path / "late" / "masked").rename(tmp_path / "late" / "gone")
    (tmp_path / "early" / "masked").rename(tmp_path / "late" / "masked")
    (tmp_path / "late" / "standard" / "state" / "checkpoint.json").unlink()  # as if killed before its first
    (tmp_path / "late" / "gone").rename(tmp_path / "gone")
    train_sweep(loader, RUNS, out=tmp_path / "late", checkpoint_every=EVERY, resume=True)
    assert contents(tmp_path / "late") == contents(whole)


def test_ctrl_c_keeps_every_step_and_says_how_to_go_on(whole, loader, tmp_path):
    """Without a regular checkpoint so far; each run stops after a whole step, and goes on to the same end."""
    read, out = MixedBatchLoader.read, tmp_path / "runs"

    def stop(self, at, **how):
        if at == 20:
            raise KeyboardInterrupt
        return read(self, at, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedBatchLoader, "read", stop)
        with pytest.raises(KeyboardInterrupt, match="add --resume to go on from step 20"):
            train_sweep(loader, RUNS, out=out, checkpoint_every=1000, n_threads=2)
    assert [json.loads(path.read_text())["n_done"] for path in out.glob("*/state/checkpoint.json")] == [20] * len(RUNS)
    train_sweep(loader, RUNS, out=out, checkpoint_every=EVERY, resume=True)
    assert contents(out).keys() == contents(whole).keys()
    for name in ("masked", "noisy"):
        file = f"{name}/sae_weights.safetensors"
        assert (out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("error", [DiskFull("full"), KeyboardInterrupt()])
def test_what_goes_wrong_while_one_run_is_finished_costs_the_others_no_step(error, whole, loader, tmp_path):
    finish = sweep.finish_run

    def fail(folder, sae, facts):
        if folder.name == "masked":
            raise error
        finish(folder, sae, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "finish_run", fail)
        with pytest.raises(type(error)):
            train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=1000)
    assert json.loads((tmp_path / "batchtopk" / "run.json").read_text())["status"] == COMPLETE
    assert {json.loads(path.read_text())["n_done"] for path in tmp_path.glob("*/state/checkpoint.json")} == {60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainRun, "step", lambda *_: pytest.fail("a step was lost"))
        train_sweep(loader, RUNS, out=tmp_path, resume=True)
    assert contents(tmp_path).keys() == contents(whole).keys()
    file = "noisy/sae_weights.safetensors"
    assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def test_a_run_of_a_sweep_is_the_run_alone(whole, loader, tmp_path):
    """Sharing batches, threads and reads with others changes nothing."""
    train_sweep(loader, RUNS[1:2], out=tmp_path / "runs", checkpoint_every=1000)
    train_sweep(loader, [RUNS[2], RUNS[4]], out=tmp_path / "runs", n_threads=2)
    for name in ("masked", "noisy", "standard"):
        file = f"{name}/sae_weights.safetensors"
        assert (tmp_path / "runs" / file).read_bytes() == (whole / file).read_bytes()


def test_a_checkpoint_holds_every_bit_of_the_state(loader, tmp_path):
    config = run_config("batchtopk", dead_tokens=64)
    run, other = (TrainRun(config, 8, 60, select("dense", "cpu")) for _ in range(2))
    run.start_at(loader.read(0).clean)
    for step in range(20):
        x = loader.read(step).clean
        run.step(x, x)
    save_checkpoint(tmp_path, run)
    restore_checkpoint(tmp_path, other)
    for step in range(20, 40):
        x = loader.read(step).clean
        for each in (run, other):
            each.step(x, x)
    ours, theirs = run.state(), other.state()
    assert other.n_done == run.n_done == 40
    assert ours.keys() == theirs.keys()
    assert {"sae.threshold", "silent_tokens", "adam.W_dec.exp_avg_sq", "adam.b_enc.step"} <= ours.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_one_checkpoint_is_kept_and_a_log_cut_off_by_a_kill_is_mended(loader, tmp_path):
    run = TrainRun(run_config("topk"), 8, 60, select("dense", "cpu"))
    for step in range(3):
        x = loader.read(step).clean
        run.step(x, x)
        append_log(tmp_path, {"step": run.n_done})
        save_checkpoint(tmp_path, run)
    assert [file.name for file in (tmp_path / "state").glob("step_*")] == ["step_000000003.safetensors"]
    append_log(tmp_path, {"step": 4})
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    again = TrainRun(run_config("topk"), 8, 60, select("dense", "cpu"))
    restore_checkpoint(tmp_path, again)
    assert again.n_done == 3
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_complete_runs_are_skipped_and_new_ones_trained(whole, loader, tmp_path):
    out = tmp_path / "runs"
    train_sweep(loader, RUNS[:1], out=out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    facts = train_sweep(loader, RUNS[:2], out=out, resume=True)
    assert [fact["status"] for fact in facts] == [COMPLETE, COMPLETE]
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: at for path, at in before.items() if path.is_file()
    }
    assert not list(out.glob("*/state"))


def test_a_folder_with_something_else_is_refused_before_anything_is_written(loader, tmp_path):
    out = tmp_path / "runs"
    train_sweep(loader, RUNS[:1], out=out)
    before = contents(out)
    with pytest.raises(UserError, match="complete; add --resume to skip it"):
        train_sweep(loader, RUNS[:1], out=out)
    with pytest.raises(UserError, match=r"another run: lr \(0.01, now 0.5\)"):
        train_sweep(loader, [RUNS[1], replace(RUNS[0], lr=0.5)], out=out, resume=True)
    longer = MixedBatchLoader(loader.cache, replace(DATA, n_tokens=64 * 60))
    with pytest.raises(UserError, match="n_tokens"):
        train_sweep(longer, RUNS[:1], out=out, resume=True)
    assert contents(out) == before
    (out / "topk").mkdir()
    (out / "topk" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no run"):
        train_sweep(loader, [run_config("topk")], out=out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.tex and no runs"):
        train_sweep(loader, RUNS, out=foreign)
    with pytest.raises(UserError, match="is a file"):
        train_sweep(loader, RUNS, out=foreign / "thesis.tex")
    with pytest.raises(UserError, match="which is a file"):
        train_sweep(loader, RUNS, out=foreign / "thesis.tex" / "runs")
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_reports_beside_the_runs_and_what_a_kill_leaves_are_no_obstacle(loader, tmp_path):
    (tmp_path / "report.html").write_text("")
    folder = tmp_path / "batchtopk"
    folder.mkdir()
    (folder / ".run.json.0123.partial").write_text("{")
    train_sweep(loader, RUNS[:1], out=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json",
        "log.jsonl",
        "run.json",
        "sae_weights.safetensors",
    ]


def test_a_damaged_checkpoint_is_said_to_be_one(loader, tmp_path):
    train_until(20, loader, RUNS[:1], tmp_path)
    (state,) = (tmp_path / "batchtopk" / "state").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint in .* is damaged"):
        train_sweep(loader, RUNS[:1], out=tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_sweep_and_completes_nothing(loader, tmp_path):
    with pytest.raises(Unfinished, match="lower --lr"):
        train_sweep(loader, [run_config("standard", lr=1e30)], out=tmp_path)
    with pytest.raises(UserError, match="not finished"):
        load_run(tmp_path / "standard")


def test_same_seed_same_start_and_same_rows_whatever_is_mixed_in(loader, tmp_path, monkeypatch):
    seen = {}
    step = TrainRun.step

    def spy(self, x, target):
        seen.setdefault(self.config.name, []).append(
            (x.clone(), self.sae.W_dec.detach().clone(), self.sae.b_dec.clone())
        )
        return step(self, x, target)

    monkeypatch.setattr(TrainRun, "step", spy)
    runs = [run_config(name=str(f), masked_fraction=f) for f in (0.0, 0.25, 1.0)]
    train_sweep(loader, [*runs, run_config(name="noisy", corrupt="gaussian=0.5")], out=tmp_path)
    (clean, W_dec, b_dec), (part, *_), (all_masked, *_), (noisy, *_) = (
        seen[n][0] for n in ("0.0", "0.25", "1.0", "noisy")
    )
    for name in seen:
        assert seen[name][0][1].equal(W_dec)
        assert seen[name][0][2].equal(b_dec)
    kept = (part == clean).all(1)
    assert int((~kept).sum()) == 8
    assert part[~kept].equal(all_masked[~kept])
    assert not (noisy == clean).any()
    later = seen["noisy"][1][0] - loader.read(1).clean
    assert torch.cosine_similarity(later.flatten(), (noisy - clean).flatten(), dim=0).abs() < 0.3  # new noise each step


def test_the_log_has_what_a_person_watches(whole):
    lines = [json.loads(line) for line in (whole / "batchtopk" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["tokens"] == 60 * 32
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["l0"] == pytest.approx(3, abs=0.1)
    assert set(lines[0]) == {"step", "tokens", "loss", "explained_variance", "l0", "n_dead", "lr"}


def test_reading_the_cache_again_is_announced(loader, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train_sweep(loader, RUNS[:1], out=tmp_path)
    announced = [record.message for record in caplog.records if "rows were read" in record.message]
    assert len(announced) == (loader.n_steps - 1) // loader.n_batches
    assert "were read once; again" in announced[0]
    assert "were read 2 times; again" in announced[1]


def test_kill_at_any_moment_loses_at_most_the_steps_since_the_checkpoint(cache, tmp_path):
    """kill -9 soon after a checkpoint, twice; when the command gets through, it is as if it had never been killed."""
    arguments = [
        *("--cache", str(cache.path), "--arch", "batchtopk,topk", "--k", "3", "--d-sae", "32", "--tokens", "16k"),
        *("--batch-size", "32", "--checkpoint-every", "50", "--masked-fraction", "0.5"),
    ]
    app([*arguments, "--out", str(tmp_path / "whole")], standalone_mode=False)
    random.seed(0)
    out = tmp_path / "killed"
    for _ in range(2):
        before = checkpoints(out)
        process = subprocess.Popen(
            [sys.executable, "-m", "train", *arguments, "--out", str(out), "--resume"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and checkpoints(out) == before:
            time.sleep(0.005)
        time.sleep(random.random() * 0.1)
        assert process.poll() is None, "it was through before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        for file in out.glob("*/run.json"):
            assert json.loads(file.read_text())["status"] == "training"
    app([*arguments, "--out", str(out), "--resume"], standalone_mode=False)
    assert contents(out) == contents(tmp_path / "whole")


def checkpoints(out: Path) -> set[str]:
    return {path.name for path in out.glob("*/state/step_*.safetensors")}
