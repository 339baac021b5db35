"""A run whose numbers are not finite stops, alone; nothing that is not finite is ever kept."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from train_fixtures import DATA, contents, make_training_cache, run_config

from cache_spec import UserError
from train.__main__ import app
from train.loader import MixedBatchLoader
from train.run_folder import load_run
from train.step import TrainRun
from train.sweep import Unfinished, failures_sentence, train_sweep


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("failures") / "cache"), DATA)


def spoil(monkeypatch, name: str, at_step: int, *, weights: bool = False):
    """Make the loss (or a weight) of one run NaN at a step, counted from 1."""
    step = TrainRun.step

    def spoiled(self, *rows):
        outcome = step(self, *rows)
        if self.config.name == name and self.n_done == at_step:
            if weights:
                self.sae.b_enc.data[0] = torch.nan
            else:
                outcome = replace(outcome, loss=outcome.loss * torch.nan)
        return outcome

    monkeypatch.setattr(TrainRun, "step", spoiled)


RUNS = [run_config("topk"), run_config("batchtopk"), run_config("standard")]


def test_the_others_go_on_to_the_same_bits(loader, tmp_path, monkeypatch, caplog):
    train_sweep(loader, RUNS, out=tmp_path / "whole", checkpoint_every=10)
    with monkeypatch.context() as patch:
        spoil(patch, "batchtopk", 33)
        facts = train_sweep(loader, RUNS, out=tmp_path / "part", checkpoint_every=10)
    assert [fact["status"] for fact in facts] == ["complete", "failed", "complete"]
    words = "batchtopk failed at step 33 (its loss is nan; its last good checkpoint is step 30)"
    assert words in caplog.text
    assert words in failures_sentence(facts)
    assert failures_sentence(facts).startswith("1 of 3 runs failed")
    ours, theirs = contents(tmp_path / "part"), contents(tmp_path / "whole")
    for name in theirs:
        if not name.startswith("batchtopk"):
            assert ours[name] == theirs[name]


def test_run_json_says_when_and_why_and_the_last_good_checkpoint_is_good(loader, tmp_path, monkeypatch):
    spoil(monkeypatch, "batchtopk", 33)
    train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=10)
    folder = tmp_path / "batchtopk"
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["status"], facts["failure"]) == (
        "failed",
        {"step": 33, "reason": "its loss is nan", "checkpoint": 30},
    )
    tensors = load_file(folder / "state" / "step_000000030.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 32
    assert not (folder / "cfg.json").exists()
    with pytest.raises(UserError, match="is no SAE: batchtopk failed at step 33"):
        load_run(folder)


@pytest.mark.parametrize("at_step", [20, 60])
def test_weights_that_are_not_finite_are_never_saved(at_step, loader, tmp_path, monkeypatch):
    """They may spoil a step whose own loss is still finite: they are looked at before a checkpoint and at the end."""
    spoil(monkeypatch, "topk", at_step, weights=True)
    (facts,) = train_sweep(loader, RUNS[:1], out=tmp_path, checkpoint_every=10)
    assert facts["failure"]["reason"] == "its weights are not finite"
    assert facts["failure"]["step"] == at_step
    assert facts["failure"]["checkpoint"] == at_step - 10
    assert not (tmp_path / "topk" / "cfg.json").exists()


def test_without_a_look_at_every_step_the_first_bad_one_is_still_named(loader, tmp_path, monkeypatch):
    """On a GPU the loss is only looked at when a line of the log is due."""
    from train.entry import Entry

    look = Entry._look
    monkeypatch.setattr(
        Entry, "_look", lambda self, loss, *, at_weights: at_weights and look(self, loss, at_weights=at_weights)
    )
    spoil(monkeypatch, "topk", 33)
    (facts,) = train_sweep(loader, RUNS[:1], out=tmp_path, checkpoint_every=20)
    assert (facts["failure"]["step"], facts["failure"]["checkpoint"]) == (33, 20)


def test_ctrl_c_after_a_bad_step_keeps_no_bad_checkpoint(loader, tmp_path, monkeypatch):
    from train.entry import Entry

    look = Entry._look
    monkeypatch.setattr(
        Entry, "_look", lambda self, loss, *, at_weights: at_weights and look(self, loss, at_weights=at_weights)
    )
    spoil(monkeypatch, "topk", 33)
    spoiled = TrainRun.step

    def stop(self, *rows):
        if self.n_done == 35:
            raise KeyboardInterrupt
        return spoiled(self, *rows)

    monkeypatch.setattr(TrainRun, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train_sweep(loader, RUNS[:1], out=tmp_path, checkpoint_every=20)
    assert [file.name for file in (tmp_path / "topk" / "state").glob("*.json")] == ["step_000000020.json"]


def test_a_loss_that_really_overflows_is_noticed(loader, tmp_path):
    facts = train_sweep(loader, [run_config("standard", lr=1e30), RUNS[0]], out=tmp_path)
    assert [fact["status"] for fact in facts] == ["failed", "complete"]
    assert facts[0]["failure"]["checkpoint"] == 0
    assert "it has no checkpoint" in failures_sentence(facts)


def test_resume_leaves_a_failed_run_as_it_is_and_trains_the_others(loader, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        spoil(patch, "batchtopk", 33)
        train_sweep(loader, RUNS[1:2], out=tmp_path, checkpoint_every=10)
    before = contents(tmp_path)
    facts = train_sweep(loader, RUNS, out=tmp_path, resume=True)
    assert [fact["status"] for fact in facts] == ["complete", "failed", "complete"]
    assert "it stays as it is, for the same recipe fails again at the same step" in caplog.text
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("batchtopk")} == before
    with pytest.raises(UserError, match="failed; add --resume to leave it as it is"):
        train_sweep(loader, RUNS[1:2], out=tmp_path)


def test_the_command_ends_with_exit_code_1_and_names_them(loader, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "topk_d32_k3_seed1", 15)
    arguments = [
        *("--cache", str(loader.cache.path), "--out", str(tmp_path), "--arch", "topk", "--k", "3", "--d-sae", "32"),
        *("--seed", "0,1", "--tokens", "640", "--batch-size", "32"),
    ]
    with pytest.raises(Unfinished, match=r"1 of 2 runs failed: topk_d32_k3_seed1 failed at step 15") as raised:
        app(arguments, standalone_mode=False)
    assert raised.value.exit_code == 1
    table = capsys.readouterr().out
    assert "failed at step 15" in table
    assert (tmp_path / "topk_d32_k3_seed0" / "cfg.json").exists()
