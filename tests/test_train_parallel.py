"""One SAE on several ranks: over the rows of a batch or over latents, it ends as on one, to rounding."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from parallel_fixtures import PARALLEL, logs, ranks
from safetensors.torch import load_file
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import ActivationCache
from train import finishing
from train.checkpoint import checkpoint_step
from train.config import DataConfig
from train.loader import MixedBatchLoader
from train.passes import needed_bytes
from train.ranks import Team
from train.run_folder import load_run
from train.sweep import train_sweep

N_STEPS, EVERY = 100, 30
STOPPED = [130, 1, 1, 1]  # exit codes: the first rank speaks for all
LONG = DataConfig(**{**vars(DATA), "n_tokens": N_STEPS * DATA.batch_size})
SLOW = {"lr": 1e-3, "d_sae": 64, "dead_tokens": 64, "aux_k": 2, "decay_start": 80}
RUNS = [
    run_config("topk", **SLOW),
    run_config("batchtopk", **SLOW),
    run_config("matryoshka", **SLOW, masked_fraction=0.5, corrupt="gaussian=0.1"),
    run_config("jumprelu", **SLOW),
    run_config("standard", **SLOW),
]
OTHERS = [
    run_config("gated", **SLOW),
    run_config("standard_april", **SLOW),
    run_config("batchtopk", **SLOW, name="consistent", masked_fraction=0.5, consistency=0.1),
    run_config("topk", **{**SLOW, "aux_k": 200}, name="all_dead"),
]


ON_FOUR = {"data": ("topk", "batchtopk", "jumprelu"), "latents": ("topk", "matryoshka", "standard")}  # four take long


def loader_of(path: Path, team: Team | None = None) -> MixedBatchLoader:
    return MixedBatchLoader(ActivationCache.open(path), LONG, team=team)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "cache"
    make_training_cache(path)
    return path


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """Every run, trained by one process."""
    out = tmp_path_factory.mktemp("alone") / "runs"
    train_sweep(loader_of(cache), RUNS + OTHERS, out=out, kernel="dense", checkpoint_every=EVERY)
    return out


def train(team, cache, runs, out, resume=False):
    loader = loader_of(cache, team)
    train_sweep(loader, runs, out=out, kernel="dense", checkpoint_every=EVERY, resume=resume, team=team)


def facts_of(out: Path, name: str) -> dict:
    return json.loads((out / name / "run.json").read_text())


def assert_alike(out: Path, alone: Path, runs) -> None:
    """Weights to 1e-5, the same counts in every line of the log, and a run.json that differs in nothing else."""
    for run in runs:
        load_run(out / run.name)
        found, wanted = (load_file(folder / run.name / "sae_weights.safetensors") for folder in (out, alone))
        assert found.keys() == wanted.keys()
        off = {name: (found[name] - tensor).abs().max().item() for name, tensor in wanted.items()}
        assert max(off.values()) < 1e-5, (run.name, off)
        lines, expected = (
            [json.loads(line) for line in (folder / run.name / "log.jsonl").read_text().splitlines()]
            for folder in (out, alone)
        )
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        for line, other in zip(lines, expected, strict=True):
            assert line == pytest.approx(other, rel=1e-4, abs=1e-4)
        ours, theirs = facts_of(out, run.name), facts_of(alone, run.name)
        assert ours.pop("held_out") == pytest.approx(theirs.pop("held_out"), rel=1e-4)
        for facts in (ours, theirs):
            (facts["calibration"] or {}).pop("rows", None)
            del facts["files"], facts["crc32c"]  # sums of what differs; load_run has compared them
            del facts["git_commit"]  # somebody may commit while the tests run
        assert (ours.pop("calibration") or {}) == pytest.approx(theirs.pop("calibration") or {}, rel=1e-4)
        assert "spread" not in theirs
        ours.pop("spread")
        assert ours == theirs
        assert (out / run.name / "cfg.json").read_bytes() == (alone / run.name / "cfg.json").read_bytes()
        assert sorted(path.name for path in (out / run.name).iterdir()) == sorted(
            path.name for path in (alone / run.name).iterdir()
        )


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_after_100_steps_a_run_on_several_ranks_is_that_of_one(parallel, n, cache, alone, tmp_path):
    """Where rounding flips no code, as with these seeds; tests/test_train_parallel_seeds.py is about that."""
    runs = [run for run in RUNS + OTHERS if n == 2 or run.name in ON_FOUR[parallel]]
    assert ranks(train, n, parallel, tmp_path, cache, runs, tmp_path / "runs") == [0] * n, logs(tmp_path)
    assert_alike(tmp_path / "runs", alone, runs)
    assert facts_of(tmp_path / "runs", "topk")["spread"] == f"{parallel} over {n} processes"
    assert "step" in (tmp_path / "rank_0.log").read_text()
    assert (tmp_path / "rank_1.log").read_text() == ""  # only the first rank speaks


def test_the_runs_have_dead_latents_for_auxk_to_choose_among(alone):
    n_dead = [
        max(json.loads(line)["n_dead"] for line in (alone / name / "log.jsonl").read_text().splitlines())
        for name in ("topk", "batchtopk", "matryoshka")
    ]
    assert min(n_dead) > 2  # more than the aux_k of the runs


@contextmanager
def ended_at(step: int, end):
    """Call `end` while the rows of this step are waited for."""
    stream = MixedBatchLoader.stream

    @contextmanager
    def ending(self, first, last, mixtures):
        def until(rows):
            for each in rows:
                if each.step == step:
                    end()
                yield each

        with stream(self, first, last, mixtures) as rows:
            yield until(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedBatchLoader, "stream", ending)
        yield


def ended(team, cache, runs, out, step, number):
    """Train until one rank gets a signal; the first does not."""
    with ended_at(step, lambda: team.rank.index == 1 and os.kill(os.getpid(), number)):
        train(team, cache, runs, out, resume=True)


def test_a_stopped_run_goes_on_on_another_number_of_ranks_and_in_another_way(cache, alone, tmp_path):
    """A signal to one rank stops all at the same step, and the checkpoint of that step is whole."""
    runs, out = RUNS[1:4], tmp_path / "runs"
    codes = ranks(ended, 4, "latents", tmp_path, cache, runs, out, 20, signal.SIGTERM)
    assert codes == STOPPED[:4], logs(tmp_path)
    steps = {checkpoint_step(out / run.name) for run in runs}
    assert len(steps) == 1
    assert steps <= {20, 21}
    assert f"add --resume to go on from step {steps.pop()}" in (tmp_path / "rank_0.log").read_text()
    assert ranks(ended, 2, "data", tmp_path, cache, runs, out, 50, signal.SIGINT) == STOPPED[:2], logs(tmp_path)
    assert "was trained with latents over 4 processes so far" in logs(tmp_path)
    assert ranks(ended, 2, "latents", tmp_path, cache, runs, out, 70, signal.SIGINT) == STOPPED[:2], logs(tmp_path)
    train_sweep(loader_of(cache), runs, out=out, kernel="dense", checkpoint_every=EVERY, resume=True)
    assert_alike(out, alone, runs)


def struck_at_the_end(team, cache, runs, out, n):
    """Train each run in a pass of its own, or all in one, until one rank gets a signal while the first is written."""
    struck = []

    def strike(*arguments):
        if team.rank.index == 1 and not struck:
            os.kill(os.getpid(), signal.SIGTERM)
        struck.append(finish_one(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        finish_one = finishing._finish_one
        patch.setattr(finishing, "_finish_one", strike)
        loader = loader_of(cache, team)
        memory = needed_bytes(runs[:n], loader, 1, "dense", team.spread)
        train_sweep(loader, runs, out=out, kernel="dense", checkpoint_every=EVERY, memory=memory, team=team)


@pytest.mark.parametrize(("n", "step"), [(1, 1), (2, N_STEPS)])
def test_a_signal_while_a_run_is_finished_stops_before_the_next_one(n, step, cache, alone, tmp_path):
    """In the same pass and in the one after it."""
    runs, out = [RUNS[0], OTHERS[3]], tmp_path / "runs"
    assert ranks(struck_at_the_end, 2, "data", tmp_path, cache, runs, out, n) == STOPPED[:2], logs(tmp_path)
    assert f"add --resume to go on from step {step}" in (tmp_path / "rank_0.log").read_text()
    assert [facts_of(out, run.name)["status"] for run in runs] == ["complete", "training"]
    assert_alike(out, alone, runs[:1])
    train_sweep(loader_of(cache), runs, out=out, kernel="dense", checkpoint_every=EVERY, resume=True)
    assert_alike(out, alone, runs)


def test_a_killed_rank_ends_the_job_by_its_name_and_its_checkpoints_are_whole(cache, alone, tmp_path):
    runs, out = RUNS[:2], tmp_path / "runs"
    codes = ranks(ended, 2, "latents", tmp_path, cache, runs, out, 70, signal.SIGKILL)
    assert codes == [1, -signal.SIGKILL], logs(tmp_path)
    said = (tmp_path / "rank_0.log").read_text()
    assert "rank 1 (host" in said
    assert "died without a word" in said
    assert "the last whole checkpoint is step 60; run the same command with --resume" in said
    assert "Traceback" not in said
    assert ranks(train, 4, "data", tmp_path, cache, runs, out, True) == [0] * 4, logs(tmp_path)
    assert_alike(out, alone, runs)
