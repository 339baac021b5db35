"""Sweeps: one read for all, each run as if it were alone, and folders that are refused before anything is written."""

import json
from dataclasses import replace

import pytest
import torch
from train_fixtures import DATA, contents, make_training_cache, run_config, sweep_runs

from cache_spec import UserError
from train.loader import MixedBatchLoader
from train.passes import needed_bytes, threads_of
from train.run_folder import COMPLETE, hold
from train.step import TrainRun
from train.sweep import Unfinished, train_sweep

RUNS = sweep_runs()
EVERY = 7


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("sweep") / "cache", layers=(1, 2))


@pytest.fixture
def loader(cache):
    return MixedBatchLoader(cache, DATA)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The sweep, trained without interruption."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    train_sweep(MixedBatchLoader(cache, DATA), RUNS, out=out, checkpoint_every=EVERY)
    return out


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_of_a_sweep_is_the_run_alone(run, whole, loader, tmp_path):
    """Sharing batches, threads and reads with others changes no bit of weights, log or facts."""
    train_sweep(loader, [run], out=tmp_path, checkpoint_every=1000)
    alone, together = contents(tmp_path / run.name), contents(whole / run.name)
    log = alone.pop("log.jsonl"), together.pop("log.jsonl")
    assert alone == together
    assert log[0] == log[1]


def test_passes_end_with_the_same_bits_as_one_pass(whole, loader, tmp_path, caplog):
    n_runs = 4
    memory = needed_bytes(RUNS[:2], loader, n_threads=2)
    with caplog.at_level("INFO"):
        train_sweep(loader, RUNS[:n_runs], out=tmp_path, checkpoint_every=EVERY, n_threads=2, memory=memory)
    assert "2 passes of 2, each reads the cache" in caplog.text
    assert "pass 2 of 2: 2 SAEs" in caplog.text
    expected = {name: data for name, data in contents(whole).items() if name.split("/")[0] in names(RUNS[:n_runs])}
    assert contents(tmp_path) == expected


def test_no_pass_holds_more_than_its_own_saes(loader, tmp_path, monkeypatch):
    alive = []
    step = TrainRun.step

    def spy(self, *rows, **more):
        alive.append(self.config.name)
        return step(self, *rows, **more)

    monkeypatch.setattr(TrainRun, "step", spy)
    train_sweep(loader, RUNS[:3], out=tmp_path, memory=needed_bytes(RUNS[:1], loader, 1))
    assert alive == [run.name for run in RUNS[:3] for _ in range(loader.n_steps)]


def test_an_sae_that_does_not_fit_alone_is_refused_before_anything_is_written(loader, tmp_path):
    with pytest.raises(UserError, match=r"big alone needs .* lower --d-sae"):
        train_sweep(loader, [run_config(name="big", d_sae=1 << 20)], out=tmp_path / "runs", memory=1 << 20)
    assert not (tmp_path / "runs").exists()


def test_large_steps_on_several_threads_have_the_same_bits_alone_and_together(loader, tmp_path, monkeypatch):
    """How many threads a step gets may depend on its size, and on nothing that trains beside it."""
    monkeypatch.setattr("train.passes._SMALL_STEP", 6 * 32 * 64 * 16)
    runs = [run_config("batchtopk", d_sae=128), run_config("topk", d_sae=256), run_config("standard", d_sae=32)]
    assert [threads_of(run, loader, 2) for run in runs] == [2, 2, 1]
    train_sweep(loader, runs, out=tmp_path / "together", n_threads=2)
    for run in runs:
        train_sweep(loader, [run], out=tmp_path / "alone", n_threads=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_a_device_that_runs_out_of_memory_is_one_sentence(loader, tmp_path, monkeypatch):
    def exhausted(self, *rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(TrainRun, "step", exhausted)
    with pytest.raises(Unfinished, match=r"CUDA out of memory.*--resume and a lower --memory") as caught:
        train_sweep(loader, RUNS[:1], out=tmp_path)
    assert "\n" not in str(caught.value)


def names(runs):
    return {run.name for run in runs}


def test_a_transcoder_sweep_is_resumed_and_shared_like_any_other(cache, tmp_path):
    loader = MixedBatchLoader(cache, replace(DATA, target_hook="layer_2"))
    runs = [run_config("topk"), run_config("batchtopk", skip=True, masked_fraction=0.5, name="skip")]
    train_sweep(loader, runs, out=tmp_path / "both")
    for run in runs:
        train_sweep(loader, [run], out=tmp_path / "alone")
    assert contents(tmp_path / "alone") == contents(tmp_path / "both")
    facts = json.loads((tmp_path / "both" / "skip" / "run.json").read_text())
    assert facts["cache"]["target"]["hook"] == "layer_2"
    assert facts["target_norm_factor"] == loader.target_scale.norm_factor


def test_complete_runs_are_skipped_and_new_ones_trained(loader, tmp_path):
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
    out, topk = tmp_path / "runs", run_config("topk")
    train_sweep(loader, [topk], out=out)
    before = contents(out)
    with pytest.raises(UserError, match="complete; add --resume to skip it"):
        train_sweep(loader, [topk], out=out)
    with pytest.raises(UserError, match=r"another run: lr \(0.01, now 0.5\)"):
        train_sweep(loader, [RUNS[1], replace(topk, lr=0.5)], out=out, resume=True)
    longer = MixedBatchLoader(loader.cache, replace(DATA, n_tokens=64 * 60))
    with pytest.raises(UserError, match="n_tokens"):
        train_sweep(longer, [topk], out=out, resume=True)
    assert contents(out) == before
    (out / "batchtopk").mkdir()
    (out / "batchtopk" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no run"):
        train_sweep(loader, [run_config("batchtopk")], out=out)
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


def test_another_way_of_reading_is_no_other_run(loader, tmp_path):
    """A cache that was moved to a slower disk is read another way; the rows are the same."""
    train_sweep(loader, RUNS[:1], out=tmp_path)
    before = contents(tmp_path)
    train_sweep(MixedBatchLoader(loader.cache, replace(DATA, io="pread")), RUNS[:1], out=tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_a_run_that_another_process_trains_is_refused(loader, tmp_path):
    with hold(tmp_path / RUNS[0].name), pytest.raises(UserError, match="in training by another process now"):
        train_sweep(loader, RUNS[:1], out=tmp_path)
    assert not list(tmp_path.rglob("*"))
    train_sweep(loader, RUNS[:1], out=tmp_path)  # and not once the other has let go


def test_reports_beside_the_runs_and_what_a_kill_leaves_are_no_obstacle(loader, tmp_path):
    (tmp_path / "report.html").write_text("")
    folder = tmp_path / "batchtopk"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "lock").touch()
    (folder / ".run.json.0123.partial").write_text("{")
    train_sweep(loader, [run_config("batchtopk")], out=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json",
        "log.jsonl",
        "run.json",
        "sae_weights.safetensors",
    ]


def test_same_seed_same_start_and_same_rows_whatever_is_mixed_in(loader, tmp_path, monkeypatch):
    seen = {}
    step = TrainRun.step

    def spy(self, x, target, **more):
        seen.setdefault(self.config.name, []).append(
            (x.clone(), self.sae.W_dec.detach().clone(), self.sae.b_dec.clone())
        )
        return step(self, x, target, **more)

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


def test_progress_says_how_fast_how_well_and_how_much_is_left(loader, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cache_spec.progress.LINE_EVERY_S", 0.0)
    train_sweep(loader, RUNS[:2], out=tmp_path)
    line = next(line for line in capsys.readouterr().err.splitlines() if ": 60/120 " in line)
    assert line.startswith("training 2 SAEs: 60/120 SAE steps")
    for word in ("left", "tokens/s", "loss", "explained", "L0", "dead"):
        assert word in line


def test_reading_the_cache_again_is_announced(loader, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train_sweep(loader, RUNS[:1], out=tmp_path)
    announced = [record.message for record in caplog.records if "rows were read" in record.message]
    assert len(announced) == loader.position(loader.n_steps - 1)[0]
    assert "were read once; again" in announced[0]
    assert "were read 2 times; again" in announced[1]
