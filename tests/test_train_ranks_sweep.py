"""A sweep on several ranks: the bits of one process, on any number of them, and an end in good order when one dies."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_job import EVERY, LIMIT_SECONDS, RUNS
from train_fixtures import contents, make_training_cache

ROOT = Path(__file__).parent.parent
GO_ON = "run the same command with --resume"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def jobs(root):
    """What became of every job of tests/ranks_job.py."""
    make_training_cache(root / "cache")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ranks_job.py"), str(root / "cache"), str(root)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def error_of(said: str) -> str:
    """The sentence that a rank ended with, if it said one; nobody ever sees a traceback."""
    assert "Traceback" not in said
    errors = re.findall(r"^error: (.*)$", said, re.MULTILINE)
    assert len(errors) <= 1
    return errors[0] if errors else ""


@pytest.mark.parametrize("name", ["two", "two nodes", "passes"])
def test_any_number_of_ranks_gives_the_bits_of_one_process(name, jobs, root):
    """Weights, logs and run.json, byte for byte; on two machines of two ranks, and in two passes for want of memory."""
    assert set(jobs[name]["codes"]) == {0}
    assert len(list((root / name).glob("*/cfg.json"))) == len(RUNS)
    assert contents(root / name) == contents(root / "one")


def test_only_the_first_rank_speaks(jobs):
    for name in ("two", "two nodes", "passes", "failing"):
        first, *others = jobs[name]["said"]
        assert "on rank 0 of" in first
        assert not "".join(others)


def test_a_killed_rank_ends_the_job_with_its_name_and_the_last_checkpoint(jobs):
    job = jobs["killed"]
    assert job["codes"] == [1, 1, -9, 1]
    assert job["seconds"] < LIMIT_SECONDS
    sentence = error_of(job["said"][0])
    assert sentence.startswith(f"rank 2 (host node0, pid {job['pids'][2]}) died without a word")
    assert re.search(rf"the last whole checkpoints? (is|are) .*steps? \d+.*; {GO_ON}$", sentence)
    assert not "".join(job["said"][1:])


def test_where_the_first_rank_is_the_killed_one_the_next_says_so(jobs):
    job = jobs["first killed"]
    assert job["codes"] == [-9, 1]
    assert job["seconds"] < LIMIT_SECONDS
    assert error_of(job["said"][1]).startswith(f"rank 0 (host node0, pid {job['pids'][0]}) died without a word")


def test_a_resumed_sweep_goes_on_with_other_numbers_of_ranks_to_the_same_bits(jobs, root):
    """Killed with four, gone on and killed with two, ended by one."""
    assert jobs["gone on"]["codes"] == [0]
    assert contents(root / "killed") == contents(root / "one")


def test_a_rank_that_is_killed_on_another_machine_is_missed(jobs):
    job = jobs["far away"]
    assert job["codes"] == [1, -9]
    assert job["seconds"] < LIMIT_SECONDS
    assert error_of(job["said"][0]).startswith(f"rank 1 (host node1, pid {job['pids'][1]}) gave no sign of life")


def test_a_rank_that_is_stopped_stops_the_others_and_all_keep_their_steps(jobs, root):
    job = jobs["interrupted"]
    assert job["codes"] == [1, 1]
    assert f"rank 1 (host node0, pid {job['pids'][1]}) was stopped by Ctrl-C or a signal" in error_of(job["said"][0])
    steps = {int(path.stem[5:]) for path in (root / "interrupted").glob("*/state/step_*.json")}
    assert any(step % EVERY for step in steps)
    kept = [(root / "interrupted" / run.name).glob("state/step_*.json") for run in RUNS]
    whole = [(root / "interrupted" / run.name / "sae_weights.safetensors").exists() for run in RUNS]
    assert all(is_whole or list(steps) for is_whole, steps in zip(whole, kept, strict=True))  # the other was faster


def test_damage_that_the_reading_rank_meets_is_said_once_and_costs_no_rank_a_step(jobs, root):
    job = jobs["damaged"]
    assert job["codes"] == [1, 1]
    assert error_of(job["said"][0]).startswith("c/3/0 fails its checksum")
    assert not error_of(job["said"][1])
    newest = {max(path.glob("step_*.json")).stem for path in (root / "damaged").glob("*/state")}
    assert newest == {"step_000000020"}


def test_a_run_that_fails_on_the_reading_rank_stops_no_other(jobs, root):
    job = jobs["failing"]
    assert job["codes"] == [1, 1]
    assert error_of(job["said"][0]).startswith("1 of 2 runs failed: failing failed at step")
    statuses = {
        path.parent.name: json.loads(path.read_text())["status"] for path in (root / "failing").glob("*/run.json")
    }
    assert statuses == {"failing": "failed", "topk": "complete"}


def test_what_is_wrong_from_the_start_is_said_once(jobs):
    job = jobs["held"]
    assert job["codes"][0] == 2
    assert job["codes"][1] in (1, 2)  # as it is found by itself, or heard of first
    assert "holds this run already, complete; add --resume" in error_of(job["said"][0])
    assert not job["said"][1]


def test_torchrun_starts_the_command(jobs, root):
    """The real thing: two processes of the command, one exit code, one voice."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "train"]
    where = ["--cache", str(root / "cache"), "--out", str(root / "by torchrun")]
    what = ["--d-sae", "32", "--k", "3,4", "--arch", "topk", "--batch-size", "32", "--tokens", "700"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *where, *what], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("runs      2") == done.stdout.count("explained") == 1
    assert len(list((root / "by torchrun").glob("*/cfg.json"))) == 2
