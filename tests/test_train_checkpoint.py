"""Checkpoints: every bit of the state, the last two, and the one before where the newest is damaged."""

import json
import os

import pytest
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import DiskFull, UserError
from train.checkpoint import (
    append_log,
    checkpoint_step,
    discard_damaged,
    last_logged,
    remove_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from train.kernels import select
from train.loader import MixedBatchLoader
from train.step import TrainRun
from train.sweep import train_sweep


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("checkpoint") / "cache"), DATA)


def new_run(**changes) -> TrainRun:
    return TrainRun(run_config("batchtopk", **changes), 8, 60, select("dense", "cpu"))


def advance(run: TrainRun, loader: MixedBatchLoader, n_steps: int) -> None:
    for _ in range(n_steps):
        x = loader.read(run.n_done).clean
        run.step(x, x)


@pytest.fixture
def saved(loader, tmp_path):
    """A folder with checkpoints at steps 10 and 20 and a log of 25 lines, and the run at step 20."""
    run = new_run(dead_tokens=64)
    for _ in range(2):
        for _ in range(10):
            advance(run, loader, 1)
            append_log(tmp_path, {"step": run.n_done})
        save_checkpoint(tmp_path, run)
    for step in range(21, 26):
        append_log(tmp_path, {"step": step})
    return tmp_path, run


def test_a_checkpoint_holds_every_bit_of_the_state(loader, saved):
    folder, run = saved
    other = new_run(dead_tokens=64)
    restore_checkpoint(folder, other)
    for each in (run, other):
        advance(each, loader, 20)
    ours, theirs = run.state(), other.state()
    assert other.n_done == run.n_done == 40
    assert ours.keys() == theirs.keys()
    assert {"sae.threshold", "silent_tokens", "adam.W_dec.exp_avg_sq", "adam.b_enc.step"} <= ours.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_the_last_two_are_kept_and_a_log_cut_off_by_a_kill_is_mended(loader, saved):
    folder, run = saved
    advance(run, loader, 1)
    save_checkpoint(folder, run)
    assert sorted(file.name for file in (folder / "state").iterdir()) == [
        f"step_0000000{step}.{end}" for step in (20, 21) for end in ("json", "safetensors")
    ]
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 26, "lo')
    restore_checkpoint(folder, new_run())
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == list(range(1, 22))
    assert last_logged(folder) == {"step": 21}


def damage_tensors(state):
    file = state / "step_000000020.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_tensors(state):
    file = state / "step_000000020.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_tensors(state):
    (state / "step_000000020.safetensors").unlink()


def damage_facts(state):
    file = state / "step_000000020.json"
    file.write_text(file.read_text().replace("20", "21"))


def cut_facts(state):
    (state / "step_000000020.json").write_text("{")


DAMAGES = [damage_tensors, cut_tensors, lose_tensors, damage_facts, cut_facts]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_if_the_newest_is_damaged_the_one_before_is_used_and_that_is_said(damage, saved, loader, caplog):
    folder, run = saved
    damage(folder / "state")
    other = new_run(dead_tokens=64)
    restore_checkpoint(folder, other)
    assert other.n_done == 10
    assert "going on from the checkpoint before it" in caplog.text
    assert last_logged(folder) == {"step": 10}
    advance(other, loader, 10)
    assert all(tensor.equal(run.state()[name]) for name, tensor in other.state().items())


def test_if_all_are_damaged_it_says_so_and_starts_nothing_over(saved):
    folder, _ = saved
    for file in (folder / "state").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    log = (folder / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole .* delete"):
        restore_checkpoint(folder, new_run())
    assert (folder / "log.jsonl").read_bytes() == log


def test_a_sweep_with_a_damaged_checkpoint_ends_as_if_nothing_had_happened(loader, tmp_path, monkeypatch):
    run = run_config("batchtopk")
    train_sweep(loader, [run], out=tmp_path / "whole")
    step = TrainRun.step

    def stop(self, *rows):
        if self.n_done == 25:
            raise KeyboardInterrupt
        return step(self, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(TrainRun, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_sweep(loader, [run], out=tmp_path / "broken", checkpoint_every=10)
    state = tmp_path / "broken" / "batchtopk" / "state"
    (state / "step_000000025.safetensors").write_bytes(b"")
    assert checkpoint_step(state.parent) == 25
    train_sweep(loader, [run], out=tmp_path / "broken", resume=True)
    for name in ("sae_weights.safetensors", "log.jsonl"):
        assert (tmp_path / "broken/batchtopk" / name).read_bytes() == (tmp_path / "whole/batchtopk" / name).read_bytes()


def test_a_full_disk_leaves_the_checkpoint_before_and_says_resume(loader, saved, monkeypatch):
    folder, run = saved
    before = {file.name: file.read_bytes() for file in (folder / "state").iterdir()}
    advance(run, loader, 1)

    def full(fd, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskFull, match="make room and run the same command with --resume"):
            save_checkpoint(folder, run)
    assert {file.name: file.read_bytes() for file in (folder / "state").iterdir()} == before


def test_a_complete_run_keeps_no_checkpoint(saved):
    folder, _ = saved
    remove_checkpoints(folder)
    assert [file.name for file in folder.iterdir()] == ["log.jsonl"]
    assert checkpoint_step(folder) == 0
    run = new_run()
    restore_checkpoint(folder, run)
    assert run.n_done == 0
    assert last_logged(folder) == {}


def test_a_damaged_newest_checkpoint_is_discarded_so_that_the_one_before_is_the_newest(saved, caplog):
    folder, _ = saved
    discard_damaged(folder)
    assert checkpoint_step(folder) == 20
    (file,) = (folder / "state").glob("step_000000020.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    discard_damaged(folder)
    assert checkpoint_step(folder) == 10
    assert "going on from the checkpoint before it" in caplog.text
    (folder / "state/step_000000010.safetensors").write_bytes(b"")
    discard_damaged(folder)  # none is whole: nothing is deleted, and restoring says so
    assert checkpoint_step(folder) == 10
    with pytest.raises(UserError, match="no checkpoint in"):
        restore_checkpoint(folder, new_run(dead_tokens=64))
