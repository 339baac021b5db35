"""Runs: what is read of run.json, which runs are left out, and which are seeds of one recipe."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluate_fixtures import no_model, small_cache, small_sae, write_four_runs, write_run

from cache_spec import ActivationCache
from evaluate.command import run
from evaluate.runs import RunsIncomplete, find_runs
from train.config import DataConfig, RunConfig
from train.run_folder import without_seal
from train.scale import recipe_label


@pytest.fixture
def cache(tmp_path) -> ActivationCache:
    return small_cache(tmp_path / "cache")


@pytest.fixture
def runs(tmp_path, cache, monkeypatch) -> Path:
    """Two seeds, masked and not, on a made-up cache whose model cannot be had."""
    no_model(monkeypatch)
    return write_four_runs(tmp_path / "runs", cache)


def evaluate(folder: Path) -> dict:
    """Run the command for core numbers; the report over all runs."""
    run(folder, out=folder, metrics="core")
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        *((None, {"norm_factor": value}, "a finite number above 0 is wanted") for value in (0, -1.0, "1", None)),
        *((None, {"norm_factor": value}, "is no number") for value in (torch.nan, torch.inf)),
        ("config", {"arch": "nosuch"}, "says what nothing was trained with: there is no architecture 'nosuch'"),
        ("config", {"arch": "../step"}, "says what nothing was trained with: there is no architecture '../step'"),
        ("config", {"arch": "matryoshka"}, "says what nothing was trained with: --d-sae 16 is too small"),
        ("config", {"k": 0}, "its architecture is batchtopk, which has a k of 1 or more, and its k is 0"),
        ("config", {"k": 17}, "says k is 17, and a whole number from 0 to 16 is wanted"),
        ("config", {"k": -1}, "says k is -1, and a whole number from 0 to 16 is wanted"),
        ("config", {"k": "many"}, "says k is 'many', and a whole number from 0 to 16 is wanted"),
        ("config", {"d_sae": 16.5}, "says d_sae is 16.5, and a whole number of 1 or more is wanted"),
        ("config", {"seed": None}, "says seed is None, and a whole number of 0 or more is wanted"),
        ("data", {"seed": "a"}, "says seed is 'a', and a whole number of 0 or more is wanted"),
    ],
)
def test_a_number_that_is_none_leaves_its_run_out(runs, where, changes, words):
    file = next(runs.glob("*_masked*_seed1/run.json"))
    facts = json.loads(file.read_text())
    file.write_text(
        json.dumps({**without_seal(facts), **(changes if where is None else {where: {**facts[where], **changes}})})
    )
    complete, left_out = find_runs(runs)
    assert len(complete) == 3
    assert words in left_out[file.parent.name]
    assert left_out[file.parent.name].count("run.json") == 1


def test_a_run_of_an_architecture_that_is_none_does_not_keep_the_others_from_being_measured(runs):
    copy = Path(shutil.copytree(next(runs.glob("*unmasked_seed0")), runs / "a_copy"))
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**without_seal(facts), "config": {**facts["config"], "arch": "nosuch"}}))
    with pytest.raises(RunsIncomplete, match=r"^1 of 5 SAEs are not in the report; a_copy: run.json says .*'nosuch'"):
        evaluate(runs)
    trained = [result for result in json.loads((runs / "report.json").read_text())["runs"] if result["path"]]
    assert len(trained) == 4


def test_a_damaged_copy_does_not_put_the_good_run_out(runs, capsys):
    one = next(runs.glob("*unmasked_seed0"))
    copy = shutil.copytree(one, one.with_name("a_copy"))  # comes before it
    (copy / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(RunsIncomplete, match=r"1 of 5 SAEs are not in the report; a_copy: .*damaged"):
        evaluate(runs)
    assert one.name in {result["run"] for result in json.loads((runs / "report.json").read_text())["runs"]}


def test_a_copy_of_a_run_does_not_pass_for_another_seed(runs, capsys):
    one = next(runs.glob("*unmasked_seed0"))
    shutil.rmtree(next(runs.glob("*unmasked_seed1")))
    shutil.copytree(one, one.with_name("zcopy"))
    with pytest.raises(RunsIncomplete, match=f"of the same recipe and seed as {one.name}"):
        evaluate(runs)
    plain = json.loads((runs / "report.json").read_text())["recipes"][0]
    assert plain["metrics"]["l0"]["n_seeds"] == 1


def test_runs_that_differ_in_another_setting_are_not_taken_for_seeds(runs):
    """Two learning rates in one folder: each has its own baseline, and the labels say which is which."""
    for file in runs.glob("*/run.json"):
        facts = json.loads(file.read_text())
        for lr in (0.001, 0.0003):
            other = shutil.copytree(file.parent, file.parent.with_name(f"{file.parent.name}_lr{lr}"))
            config = {**facts["config"], "lr": lr, "penalties": ["auxk=0.1"]}
            (other / "run.json").write_text(json.dumps({**without_seal(facts), "name": other.name, "config": config}))
        shutil.rmtree(file.parent)
    report = evaluate(runs)
    trained = [r for r in report["recipes"] if r["kind"] == "trained"]
    assert sorted((r["recipe"], r["settings"]) for r in trained) == [
        ("masked 0.5", "lr 0.0003"),
        ("masked 0.5", "lr 0.001"),
        ("unmasked", "lr 0.0003"),
        ("unmasked", "lr 0.001"),
    ]
    assert all(r["metrics"]["l0"]["n_seeds"] == 2 for r in trained)
    assert all(d["settings"] == d["baseline"]["settings"] for d in report["differences"])


CONFIG = {
    field.name
    for field in dataclasses.fields(RunConfig)
    if field.name not in ("name", "arch", "d_sae", "k", "seed", "masked_fraction", "corrupt", "matched_fraction")
}


@pytest.mark.parametrize("name", [*sorted(CONFIG), "n_tokens", "batch_size"])
def test_whatever_differs_makes_another_recipe(runs, name):
    """By its settings, or by the label that training gives it."""
    part = "config" if name in CONFIG else "data"
    for number, file in enumerate(sorted(runs.glob("*/run.json"))):
        facts = json.loads(file.read_text())
        value = ("linear=20", "linear=30")[number % 2] if name == "masked_schedule" else number % 2 + 1
        if name in ("masked_schedule", "consistency", "skip"):
            length = {"warmup_steps": 1, "decay_start": 1, "sparsity_warmup_steps": 1, "threshold_start": 1}
            length |= {"threshold_beta": 0.9, "dead_tokens": 1}
            chosen = {**facts["config"], "masked_fraction": 0.5, "skip": False, **length, "name": "", name: value}
            chosen["skip"] = name == "skip" and number % 2 == 0
            facts["recipe"] = recipe_label(RunConfig(**chosen), DataConfig(hook="layer_1", n_tokens=1))
        facts[part][name] = value
        file.write_text(json.dumps(without_seal(facts)))
    found, _ = find_runs(runs)
    assert (
        len({run.recipe if name in ("masked_schedule", "consistency", "skip") else run.settings for run in found}) == 2
    )
    assert {run.settings for run in found} in ({""}, {f"{name.replace('n_tokens', 'tokens')} {i}" for i in (1, 2)})


def test_a_schedule_that_follows_from_the_length_of_the_training_is_not_named(runs):
    for number, file in enumerate(sorted(runs.glob("*/run.json"))):
        facts = json.loads(file.read_text())
        facts["config"]["warmup_steps"] = facts["data"]["n_tokens"] = number % 2
        file.write_text(json.dumps(without_seal(facts)))
    assert {run.settings for run in find_runs(runs)[0]} == {"tokens 0", "tokens 1"}


def test_penalties_that_vary_and_positions_of_masked_runs_are_named(runs):
    for number, file in enumerate(sorted(runs.glob("*/run.json"))):
        facts = json.loads(file.read_text())
        facts["config"]["penalties"] = [f"l1=0.0{number}"]
        facts["data"]["positions"] = "drop_masked"
        file.write_text(json.dumps(without_seal(facts)))
    found, _ = find_runs(runs)
    assert sorted(run.settings for run in found) == ["l1=0.00", "l1=0.01", "l1=0.02", "l1=0.03"]
    assert {run.recipe for run in found} == {"unmasked", "masked 0.5, drop_masked"}


def test_what_a_run_is_a_control_for_is_read_from_its_facts(runs, cache):
    write_run(runs, cache, small_sae(3), corrupt="gaussian=0.4")
    write_run(runs, cache, small_sae(4), corrupt="dropout=0.4")
    write_run(runs, cache, small_sae(5), masked=0.5, variant="random")
    write_run(runs, cache, small_sae(6), masked=0.5, variant="masked_2")
    write_run(runs, cache, small_sae(7, d_sae=8))
    found = {(run.recipe, run.d_sae): (run.control, run.is_plain, run.is_masked) for run in find_runs(runs)[0]}
    assert found == {
        ("unmasked", 16): ("", True, False),
        ("unmasked", 8): ("small dictionary", True, False),
        ("masked 0.5", 16): ("", False, True),
        ("masked_2 0.5", 16): ("", False, True),
        ("random 0.5", 16): ("random token", False, False),
        ("gaussian 0.4", 16): ("noise", False, False),
        ("dropout 0.4", 16): ("dropout", False, False),
    }
