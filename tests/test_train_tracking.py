"""Logging elsewhere: the calls that wandb, Trackio and TensorBoard get, without any of them and without a network."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import UserError
from train.__main__ import app
from train.loader import MixedBatchLoader
from train.step import TrainRun
from train.sweep import train_sweep
from train.tracking import open_trackers


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("tracking") / "cache"), DATA)


class FakeRun:
    """The two methods that wandb's and Trackio's runs share."""

    def __init__(self, **how):
        self.how, self.logged, self.n_finished = how, [], 0

    def log(self, metrics, step):
        assert not self.n_finished
        self.logged.append((step, dict(metrics)))

    def finish(self):
        self.n_finished += 1


def fake_service(monkeypatch, name: str) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**how):
        runs.append(FakeRun(**how))
        return runs[-1]

    module = ModuleType(name)
    module.init, module.Error = init, type("Error", (Exception,), {})  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, name, module)
    return runs


def fake_board(monkeypatch) -> list[SimpleNamespace]:
    writers = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            self.seen = SimpleNamespace(log_dir=log_dir, purge_step=purge_step, scalars=[], n_closed=0)
            writers.append(self.seen)

        def add_scalar(self, key, value, step):
            self.seen.scalars.append((key, value, step))

        def close(self):
            self.seen.n_closed += 1

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return writers


RUNS = [run_config("topk"), run_config("standard", masked_fraction=0.5)]


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_one_run_for_each_sae_and_every_line_of_its_log(name, loader, tmp_path, monkeypatch):
    runs = fake_service(monkeypatch, name)
    train_sweep(loader, RUNS, out=tmp_path, open_tracker=open_trackers(name))
    assert [run.how["name"] for run in runs] == [f"{tmp_path.name}.topk", f"{tmp_path.name}.standard"]
    for run, config in zip(runs, RUNS, strict=True):
        assert (run.how["project"], run.how["resume"]) == ("granary", "allow")
        assert run.how["config"]["masked_fraction"] == config.masked_fraction
        assert run.how["config"]["data.batch_size"] == DATA.batch_size
        assert run.how["config"]["model"] == "made-up"
        lines = log_of(tmp_path / config.name)
        assert run.logged == [
            (line["step"], {key: value for key, value in line.items() if value is not None}) for line in lines
        ]
        assert run.n_finished == 1


def test_wandb_runs_stand_beside_each_other_and_come_back_under_the_same_id(loader, tmp_path, monkeypatch):
    runs = fake_service(monkeypatch, "wandb")
    with monkeypatch.context() as patch:
        patch.setattr(TrainRun, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_sweep(loader, RUNS, out=tmp_path / "one", open_tracker=open_trackers("wandb"))
    for out in ("one", "two"):
        train_sweep(loader, RUNS, out=tmp_path / out, open_tracker=open_trackers("wandb"), resume=True)
    assert {run.how["reinit"] for run in runs} == {"create_new"}
    ids = [run.how["id"] for run in runs]
    assert ids[:2] == ids[2:4]
    assert len(set(ids)) == 4  # another --out is another run
    assert set("".join(ids)) <= set("0123456789abcdef")
    assert runs[0].how["dir"] == str(tmp_path / "one" / "topk")


def test_wandb_that_cannot_start_is_one_sentence(loader, tmp_path, monkeypatch):
    fake_service(monkeypatch, "wandb")
    module = sys.modules["wandb"]

    def refuse(**how):
        raise module.Error("api_key not configured")

    monkeypatch.setattr(module, "init", refuse)
    with pytest.raises(UserError, match=r"api_key not configured.*WANDB_MODE=offline"):
        train_sweep(loader, RUNS, out=tmp_path, open_tracker=open_trackers("wandb"))


def test_tensorboard_writes_into_each_run_s_folder(loader, tmp_path, monkeypatch):
    writers = fake_board(monkeypatch)
    train_sweep(loader, RUNS, out=tmp_path, open_tracker=open_trackers("tensorboard"))
    for writer, config in zip(writers, RUNS, strict=True):
        assert writer.log_dir == str(tmp_path / config.name / "tensorboard")
        assert (writer.purge_step, writer.n_closed) == (1, 1)
        losses = [(value, step) for key, value, step in writer.scalars if key == "loss"]
        assert losses == [(line["loss"], line["step"]) for line in log_of(tmp_path / config.name)]
        assert "step" not in {key for key, _, _ in writer.scalars}


def test_a_resumed_board_drops_what_came_after_the_checkpoint(loader, tmp_path, monkeypatch):
    writers = fake_board(monkeypatch)
    step = TrainRun.step

    def stop(self, *rows):
        if self.n_done == 25:
            raise KeyboardInterrupt
        return step(self, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(TrainRun, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_sweep(loader, RUNS[:1], out=tmp_path, open_tracker=open_trackers("tensorboard"))
    train_sweep(loader, RUNS[:1], out=tmp_path, open_tracker=open_trackers("tensorboard"), resume=True)
    assert [writer.purge_step for writer in writers] == [1, 26]
    assert [writer.n_closed for writer in writers] == [1, 1]


def test_no_tracker_is_imported_unless_it_is_asked_for(monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    assert open_trackers("") is None


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_package_that_is_not_installed_is_one_sentence_before_anything_is_written(
    name, loader, tmp_path, monkeypatch
):
    for module in [module for module in sys.modules if module.split(".")[0] == name or module.endswith("tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"--track {name} needs the package {name}.*pip install {name}"):
        app(
            ["--cache", str(loader.cache.path), "--out", str(tmp_path / "runs"), "--track", name],
            standalone_mode=False,
        )
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker_is_refused_with_the_names_that_exist():
    with pytest.raises(UserError, match="--track mlflow is unknown; it is one of wandb, trackio, tensorboard"):
        open_trackers("mlflow")
