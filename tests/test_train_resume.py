"""Resuming: after an interruption, or a kill -9 at any moment, a sweep ends with the bits of one that never stopped."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_fixtures import DATA, contents, make_training_cache, run_config, sweep_runs

from cache_spec import CacheDamaged, DiskFull, UserError
from train import finishing
from train.config import RunConfig
from train.loader import MixedBatchLoader
from train.run_folder import COMPLETE, without_seal
from train.step import TrainRun
from train.sweep import Unfinished, train_sweep

ROOT = Path(__file__).parent.parent
RUNS = sweep_runs()
EVERY = 7


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("resume") / "cache")


@pytest.fixture
def loader(cache):
    return MixedBatchLoader(cache, DATA)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The sweep, trained without interruption."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    train_sweep(MixedBatchLoader(cache, DATA), RUNS, out=out, checkpoint_every=EVERY)
    return out


@contextmanager
def interrupted_at(step: int):
    """Ctrl-C while the rows of this step are waited for."""
    stream = MixedBatchLoader.stream

    @contextmanager
    def stopping(self, first, last, mixtures):
        def until(rows):
            for each in rows:
                if each.step == step:
                    raise KeyboardInterrupt
                yield each

        with stream(self, first, last, mixtures) as rows:
            yield until(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedBatchLoader, "stream", stopping)
        with pytest.raises(KeyboardInterrupt, match="add --resume to go on from step"):
            yield


@pytest.mark.parametrize("steps", [[20], [3], [14, 15, 16, 50]])
def test_a_resumed_sweep_ends_as_if_it_had_never_stopped(steps, whole, loader, tmp_path):
    """Weights, thresholds, logs and run.json, byte for byte; with all controls, AuxK and both kinds of threshold."""
    for step in steps:
        with interrupted_at(step):
            train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=EVERY, resume=True)
        statuses = {json.loads(path.read_text())["status"] for path in tmp_path.glob("*/run.json")}
        assert statuses == {"training"}
        assert not list(tmp_path.glob("*/cfg.json"))
    train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=EVERY, resume=True)
    assert contents(tmp_path) == contents(whole)


def few_codes() -> list[RunConfig]:
    """What the sparse kernel can train, in both precisions; jumprelu's steps are dense and then sparse."""
    return [
        run_config(arch, name=f"{arch}_{precision}", precision=precision, d_sae=256, masked_fraction=fraction)
        for arch, fraction in (("topk", 0.5), ("batchtopk", 0.0), ("matryoshka", 0.0), ("jumprelu", 0.0))
        for precision in ("fp32", "bf16")
    ]


def test_with_the_sparse_kernel_the_bits_depend_on_nothing_but_the_run(loader, tmp_path):
    """Not on an interruption, threads, or what trains beside it."""

    def train(folder: str, runs: list[RunConfig], **how) -> None:
        train_sweep(loader, runs, out=tmp_path / folder, kernel="sparse", checkpoint_every=EVERY, **how)

    train("whole", few_codes())
    with interrupted_at(20):
        train("stopped", few_codes())
    train("stopped", few_codes(), resume=True, n_threads=2)
    for run in few_codes():
        train("alone", [run])
    assert contents(tmp_path / "stopped") == contents(tmp_path / "alone") == contents(tmp_path / "whole")


def test_a_run_from_before_there_was_a_choice_of_precision_goes_on_in_fp32(loader, tmp_path):
    with interrupted_at(20):
        train_sweep(loader, [run_config("topk")], out=tmp_path, checkpoint_every=EVERY)
    file = tmp_path / "topk" / "run.json"
    facts = json.loads(file.read_text())
    del facts["config"]["precision"]
    file.write_text(json.dumps(without_seal(facts)))
    with pytest.raises(UserError, match=r"precision \(fp32, now bf16\)"):
        train_sweep(loader, [run_config("topk", precision="bf16")], out=tmp_path, resume=True)
    assert train_sweep(loader, [run_config("topk")], out=tmp_path, resume=True)[0]["status"] == COMPLETE


def test_another_kernel_may_go_on_and_the_run_says_so(loader, tmp_path, caplog):
    runs = [run_config("topk")]
    with interrupted_at(20):
        train_sweep(loader, runs, out=tmp_path, kernel="sparse", checkpoint_every=EVERY)
    with interrupted_at(30):
        train_sweep(loader, runs, out=tmp_path, kernel="dense", checkpoint_every=EVERY, resume=True)
    train_sweep(loader, runs, out=tmp_path, kernel="dense", checkpoint_every=EVERY, resume=True)
    assert caplog.text.count("topk was trained with --kernel sparse so far and goes on with dense") == 1
    assert json.loads((tmp_path / "topk" / "run.json").read_text())["kernel"] == "sparse, dense"


def test_runs_that_stopped_at_different_steps_go_on_from_where_each_was(whole, loader, tmp_path):
    for out, step in (("early", 10), ("late", 40)):
        with interrupted_at(step):
            train_sweep(loader, RUNS, out=tmp_path / out, checkpoint_every=EVERY)
    (tmp_path / "late" / "masked").rename(tmp_path / "late" / "gone")
    (tmp_path / "early" / "masked").rename(tmp_path / "late" / "masked")
    for file in (tmp_path / "late" / "standard" / "state").glob("step_*.json"):
        file.unlink()  # as if killed before its first
    (tmp_path / "late" / "gone").rename(tmp_path / "gone")
    train_sweep(loader, RUNS, out=tmp_path / "late", checkpoint_every=EVERY, resume=True)
    assert contents(tmp_path / "late") == contents(whole)


def test_ctrl_c_keeps_every_step_and_says_how_to_go_on(whole, loader, tmp_path):
    """Without a regular checkpoint so far; each run stops after a whole step, and goes on to the same end."""
    with interrupted_at(20):
        train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=1000, n_threads=2)
    assert {path.name for path in tmp_path.glob("*/state/*.json")} <= {"step_000000019.json", "step_000000020.json"}
    train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=EVERY, resume=True)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("error", [DiskFull("full"), KeyboardInterrupt()])
def test_what_goes_wrong_while_one_run_is_finished_costs_the_others_no_step(error, whole, loader, tmp_path):
    finish = finishing.finish_run

    def fail(folder, sae, facts):
        if folder.name == "masked":
            raise error
        finish(folder, sae, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "finish_run", fail)
        with pytest.raises(type(error)):
            train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=EVERY)
    assert json.loads((tmp_path / "batchtopk" / "run.json").read_text())["status"] == COMPLETE
    newest = {max(path.glob("step_*.json")).name for path in tmp_path.glob("*/state")}
    assert newest == {"step_000000060.json"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainRun, "step", lambda *_: pytest.fail("a step was lost"))
        train_sweep(loader, RUNS, out=tmp_path, resume=True)
    assert contents(tmp_path) == contents(whole)


# Forks children that train the sweep and kill themselves. First one of 200 steps after step 100; then at random
# moments: before a system call that changes a file, or inside a step. In the end each chain of kills is followed by
# one that gets through.
KILLER = """
import os, random, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from cache_spec import ActivationCache
from train.loader import MixedBatchLoader
from train.step import TrainRun
from train.sweep import train_sweep
from train_fixtures import DATA, contents, run_config

torch.set_num_threads(1)
runs = [run_config("batchtopk", masked_fraction=0.5), run_config("topk"), run_config("jumprelu")]
cache, root = ActivationCache.open({cache!r}), Path(sys.argv[1])
random.seed(0)

def train(out):
    train_sweep(MixedBatchLoader(cache, DATA), runs, out=out, checkpoint_every=5, resume=True)

def dying(call, left):
    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counted

def forked(out, n, of_steps):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        left = [n]
        if of_steps:
            TrainRun.step = dying(TrainRun.step, left)
        else:
            for name in ("write", "replace", "unlink", "fsync"):
                setattr(os, name, dying(getattr(os, name), left))
        train(out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def half(out):
    loader = MixedBatchLoader(cache, replace(DATA, n_tokens=32 * 200))
    train_sweep(loader, runs, out=out, checkpoint_every=100, resume=True)

half(root / "in one go")
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    step = TrainRun.step
    def until_100(self, *rows):
        if self.n_done == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *rows)
    TrainRun.step = until_100
    half(root / "in halves")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
assert max((root / "in halves").glob("*/state/step_*.json")).name == "step_000000100.json"
half(root / "in halves")
assert contents(root / "in one go") == contents(root / "in halves")

train(root / "whole")
n_kills = 0
for chain in range(4):
    out = root / str(chain)
    for _ in range(3):
        code = forked(out, random.randrange(60), chain % 2 == 0)
        assert code in (0, -signal.SIGKILL), code
        n_kills += code != 0
    train(out)
    assert contents(out) == contents(root / "whole"), chain
print("killed", n_kills, "times")
"""


def test_a_kill_at_any_moment_and_a_resume_end_with_the_same_bits(cache, tmp_path):
    code = KILLER.format(paths=[str(ROOT), str(ROOT / "tests")], cache=str(cache.path))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    n_kills = int(done.stdout.split()[-2])
    assert n_kills >= 8, done.stdout


def test_a_damaged_file_that_only_comes_up_in_training_costs_no_step(whole, loader, tmp_path, monkeypatch):
    """Positioned reads check a file when they first come to it."""
    stream = MixedBatchLoader.stream

    @contextmanager
    def failing(self, first, last, mixtures):
        def until(rows):
            for each in rows:
                if each.step == 20:
                    raise CacheDamaged("c/3/0 fails its checksum; delete its record and run the same harvest")
                yield each

        with stream(self, first, last, mixtures) as rows:
            yield until(rows)

    with monkeypatch.context() as patch:
        patch.setattr(MixedBatchLoader, "stream", failing)
        with pytest.raises(Unfinished, match=r"fails its checksum.*then run the same command with --resume") as caught:
            train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=1000)
    assert caught.value.exit_code == 1
    assert {max(path.glob("step_*.json")).name for path in tmp_path.glob("*/state")} == {"step_000000020.json"}
    train_sweep(loader, RUNS, out=tmp_path, checkpoint_every=EVERY, resume=True)
    assert contents(tmp_path) == contents(whole)
