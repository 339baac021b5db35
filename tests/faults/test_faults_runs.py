"""Damage to runs, finished or not, and to what evaluate keeps: refused by name, made again, or without effect."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from damage import DAMAGE, damaged, kinds, refusal, swapped
from evaluate_fixtures import no_model, small_cache, write_four_runs
from stages import contents_of
from test_train_resume import interrupted_at
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import ActivationCache, UserError, derive_seed
from evaluate.command import run as evaluate
from train.checkpoint import checkpoint_step
from train.commands.export import app as export_app
from train.loader import MixedBatchLoader
from train.run_folder import load_run
from train.sweep import train_sweep

RUNS = [run_config("topk"), run_config("batchtopk", masked_fraction=0.5)]
HOWS = ("a flipped bit", "cut short")


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("runs") / "cache"), DATA)


@pytest.fixture(scope="module")
def whole(loader, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "runs"
    train_sweep(loader, RUNS, out=out, checkpoint_every=10)
    return out


@pytest.fixture
def half(loader, tmp_path):
    """Interrupted after step 25, so that there are checkpoints of two steps."""
    with interrupted_at(25):
        train_sweep(loader, RUNS, out=tmp_path / "half", checkpoint_every=10)
    return tmp_path / "half"


def export(run: Path, out: Path) -> None:
    export_app([str(run), "--to", "saelens", "--out", str(out)], standalone_mode=False)


def each_damage(root: Path, n: int, seed: str) -> list[tuple[Path, Callable, random.Random]]:
    """Some files of every kind, and what happens to each."""
    rng = random.Random(derive_seed("tests/faults", seed))
    found = [(rng.choice(paths), DAMAGE[how]) for paths in kinds(root).values() for how in HOWS for _ in range(n)]
    return [(path, how, random.Random(rng.random())) for path, how in found]


def test_a_finished_run_is_refused_or_is_the_same_sae(whole, n_kills, tally, tmp_path):
    run, outcomes = whole / "topk", Counter()
    export(run, tmp_path / "whole")
    for i, (path, how, rng) in enumerate(each_damage(run, max(2, n_kills // 20), "finished")):
        out = tmp_path / str(i)
        with damaged(path, how, rng):
            if refusal(lambda at=out: export(run, at), path, names=(str(run),)):
                assert not out.exists()
                outcomes["one sentence, nothing written"] += 1
            else:
                assert path.name in ("log.jsonl", "run.json"), path  # of the latter a bit that means the same
                assert contents_of(out) == contents_of(tmp_path / "whole"), path
                outcomes["no effect on the SAE"] += 1
    tally("run: a flipped bit or a cut in every file", "export", outcomes)


def test_a_run_in_training_goes_on_to_the_same_bytes_or_is_refused(half, whole, loader, n_kills, tally, tmp_path):
    outcomes = Counter()
    for i, (path, how, rng) in enumerate(each_damage(half / "topk", max(1, n_kills // 60), "training")):
        out = tmp_path / str(i)
        shutil.copytree(half, out)
        spoiled = out / path.relative_to(half)
        with damaged(spoiled, how, rng):
            said = refusal(
                lambda at=out: train_sweep(loader, RUNS, out=at, checkpoint_every=10, resume=True),
                spoiled,
                names=(str(spoiled.parent), str(out / "topk")),
            )
            if said:
                outcomes["one sentence"] += 1
            else:
                found, wanted = contents_of(out), contents_of(whole)
                unlike = {name for name in wanted if found.get(name) != wanted[name]}
                # the log has no checksum: a changed number in it is nobody's input
                assert unlike <= ({"topk/log.jsonl"} if path.name == "log.jsonl" else set()), (path, unlike)
                outcomes["went on to the same bytes"] += 1
    tally("run in training, and its checkpoints: a flipped bit or a cut in every file", "train --resume", outcomes)


def test_checkpoints_that_changed_places_are_not_taken(half, whole, loader, tally):
    first, second = sorted((half / "topk" / "state").glob("step_*.safetensors"))[-2:]
    with swapped(first, second):
        assert refusal(
            lambda: train_sweep(loader, RUNS, out=half, resume=True), second, names=(str(half / "topk" / "state"),)
        )
    train_sweep(loader, RUNS, out=half, checkpoint_every=10, resume=True)
    assert contents_of(half) == contents_of(whole)
    for name in ("sae_weights.safetensors", "cfg.json"):
        with (
            swapped(half / "topk" / name, half / "batchtopk" / name),
            pytest.raises(UserError, match=r"is damaged .*move it away"),
        ):
            load_run(half / "topk")
    tally("two checkpoints swapped, weights or settings of two runs swapped", "train --resume, export", {"refused": 3})


def test_a_cache_that_is_deleted_under_a_running_training_costs_no_step(tally, tmp_path):
    """With positioned reads and one open shard the next file is not there; a mapped one stays until it is let go."""
    outcomes = Counter()
    data = replace(DATA, open_shards=1)
    theirs = MixedBatchLoader(make_training_cache(tmp_path / "kept", n_train=960), data)
    train_sweep(theirs, RUNS, out=tmp_path / "whole", checkpoint_every=10)
    for io in ("mmap", "pread"):
        for step in (3, 17, 41):
            cache, out = tmp_path / "cache", tmp_path / f"{io}{step}"
            shutil.copytree(tmp_path / "kept", cache)
            mine = MixedBatchLoader(ActivationCache.open(cache), replace(data, io=io, read_ahead=1))
            with deleted_at(step, cache):
                said = refusal(
                    lambda mine=mine, out=out: train_sweep(mine, RUNS, out=out, checkpoint_every=1000), cache
                )
            if said:
                assert checkpoint_step(out / "topk") >= step - 1, "steps were lost"
                train_sweep(theirs, RUNS, out=out, checkpoint_every=10, resume=True)
            for name in ("topk", "batchtopk"):
                found, wanted = (folder / name / "sae_weights.safetensors" for folder in (out, tmp_path / "whole"))
                assert found.read_bytes() == wanted.read_bytes()
            outcomes["one sentence, went on to the same bytes" if said else "no harm, the same bytes"] += 1
    tally("the cache is deleted under a running training", "train", outcomes)


@contextmanager
def deleted_at(step: int, cache: Path) -> Iterator[None]:
    """The cache goes while the rows of this step are waited for."""
    stream = MixedBatchLoader.stream

    @contextmanager
    def deleting(self, first, last, mixtures):
        def until(rows):
            for each in rows:
                if each.step == step:
                    shutil.rmtree(cache)
                yield each

        with stream(self, first, last, mixtures) as rows:
            yield until(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedBatchLoader, "stream", deleting)
        yield


def test_what_evaluate_keeps_is_measured_again_and_a_damaged_run_left_out_aloud(
    n_kills, tally, tmp_path, monkeypatch, capsys
):
    no_model(monkeypatch)
    runs, outcomes = write_four_runs(tmp_path / "runs", small_cache(tmp_path / "cache")), Counter()
    evaluate(runs, metrics="core", out=runs)
    wanted = contents_of(runs)
    for path, how, rng in each_damage(runs, max(1, n_kills // 60), "evaluate"):
        with damaged(path, how, rng):
            said = refusal(lambda: evaluate(runs, metrics="core", out=runs), path, names=(path.parent.name,))
            found = contents_of(runs)
        if said:
            assert path.name in ("run.json", "cfg.json", "sae_weights.safetensors")
            outcomes["left out by name, the others measured, exit code 1"] += 1
        else:
            name = path.relative_to(runs).as_posix()
            assert path.name == "run.json" or found[name] == wanted[name], path
            outcomes["measured again, the same bytes"] += 1
        evaluate(runs, metrics="core", out=runs)
        assert contents_of(runs) == wanted, path
    tally("runs and reports: a flipped bit or a cut in every file", "evaluate", outcomes)


def test_a_run_json_changed_by_hand_is_refused_and_says_what_to_do_if_that_was_meant(whole, tmp_path):
    shutil.copytree(whole / "topk", tmp_path / "topk")
    file = tmp_path / "topk" / "run.json"
    text = file.read_text()
    file.write_text(text.replace('"k": 3', '"k": 4'))
    with pytest.raises(UserError, match=r"run.json does not match its own checksum.* or delete its line crc32c"):
        load_run(tmp_path / "topk")
    facts = json.loads(file.read_text())
    del facts["crc32c"]
    file.write_text(json.dumps(facts, indent=1) + "\n")
    assert load_run(tmp_path / "topk").facts["config"]["k"] == 4
