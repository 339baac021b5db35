"""Runs on the hub: SAELens's layout, a card from what was measured, nothing of this machine, and clear refusals."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_store import HubStore, Repo, serving
from huggingface_hub import HfApi, ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from train_fixtures import make_training_cache, run_config
from typer.main import get_command

from cache_spec import CacheConflict, UserError
from cache_spec.__main__ import app as cache_app
from cache_spec.hub import HubError, Repository
from evaluate.statistics import paired_test
from train import DataConfig, MixedBatchLoader, train_sweep
from train.card import interval, model_card
from train.commands.push import app
from train.pushing import files_to_push, push_files, read_report, read_runs, without_paths
from train.run_folder import load_run, without_seal

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # as in test_cache_hub.py
NAMED = Repository(name="owner/saes", kind="model")
KEY = ("models", "owner/saes")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of a masked recipe and one run of another, in a folder whose name is easy to find again."""
    folder = tmp_path_factory.mktemp("a-place-of-this-machine")
    data = DataConfig(hook="layer_1", n_tokens=640, batch_size=32)
    loader = MixedBatchLoader(make_training_cache(folder / "cache.zarr"), data, with_masked=True)
    runs = [run_config(name=f"masked_seed{seed}", seed=seed, masked_fraction=0.5) for seed in (0, 1)]
    train_sweep(loader, [*runs, run_config("topk")], out=folder / "runs")
    return folder / "runs"


@pytest.fixture
def runs(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def store():
    store = HubStore()
    with serving(store):
        yield store


def report(run: Path, **metrics: float | None) -> None:
    """A report as evaluate writes it beside a run."""
    found = {"run": run.name, "l0": 3.0, "metrics": {"core": metrics}, "missing": [f"no text at {run.resolve()}/x"]}
    (run / "report.json").write_text(json.dumps(found))


def card_of(runs: Path) -> str:
    return model_card(read_runs(runs), NAMED)


def push(runs: Path, private: bool = False) -> None:
    found = read_runs(runs)
    push_files(files_to_push(found, read_report(runs), model_card(found, NAMED)), NAMED, private=private)


def command(*words: object) -> None:
    app(list(map(str, words)), standalone_mode=False)


def row(card: str, start: str) -> list[str]:
    lines = [line for line in card.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in lines[0].strip("|").split(" | ")]


def test_the_repository_has_saelens_layout_and_the_very_weights(runs, store):
    report(runs / "topk", explained_variance=0.5)
    (runs / "report.json").write_text(json.dumps({"sentence": "No verdict.", "left_out": {}}))
    for folder in (runs, runs / "topk"):  # `evaluate RUNS` and `evaluate RUN` leave a page
        (folder / "report.html").write_text("<!doctype html>")
    push(runs)
    repo = store.repos[KEY]
    ids = ["masked_seed0", "masked_seed1", "topk"]
    layout = {f"{sae}/{name}" for sae in ids for name in ("cfg.json", "sae_weights.safetensors", "run.json")}
    assert set(repo.files) == layout | {".gitattributes", "README.md", "report.json", "topk/report.json"}
    assert len(repo.commits) == 1
    for sae in ids:
        weights = load(repo.files[f"{sae}/sae_weights.safetensors"])
        tensors = load((runs / sae / "sae_weights.safetensors").read_bytes())
        assert weights.keys() == tensors.keys()
        assert all(torch.equal(weights[name], tensors[name]) for name in tensors)
        assert json.loads(repo.files[f"{sae}/cfg.json"]) == json.loads((runs / sae / "cfg.json").read_text())


def test_what_is_fetched_again_is_a_run(runs, store, tmp_path):
    push(runs)
    for name in ("cfg.json", "sae_weights.safetensors", "run.json"):
        HfApi().hf_hub_download("owner/saes", f"topk/{name}", local_dir=tmp_path / "fetched")
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_run(tmp_path / "fetched/topk").sae(rows), load_run(runs / "topk").sae(rows))


def test_nothing_pushed_names_a_place_of_this_machine(runs, store):
    report(runs / "topk", explained_variance=0.5)
    push(runs)
    everything = b"".join(store.repos[KEY].files.values())
    assert b"a-place-of-this-machine" not in everything  # where the cache is
    assert str(runs.resolve()).encode() not in everything  # what the report names
    assert b"hf_owners" not in everything
    facts = json.loads(store.repos[KEY].files["topk/run.json"])
    assert facts["cache"]["path"] == "cache.zarr"
    assert facts["config"] == json.loads((runs / "topk/run.json").read_text())["config"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/someone/my cache.zarr", "my cache.zarr"),
        ("~/models/mine", "mine"),
        ("no text at /data/someone/x.jsonl; give one", "no text at x.jsonl; give one"),
        ("../../elsewhere/x", "x"),
        ("EleutherAI/pythia-160m", "EleutherAI/pythia-160m"),
        ("https://arxiv.org/abs/2604.06495", "https://arxiv.org/abs/2604.06495"),
        ("blocks.2.hook_resid_post and/or 1/2", "blocks.2.hook_resid_post and/or 1/2"),
        ("", ""),
    ],
)
def test_paths_are_cut_down_to_their_names_and_other_text_stays(text, left):
    assert without_paths({"a": [text, 1, None]}) == {"a": [left, 1, None]}


def test_the_card_is_one_that_the_hub_reads_and_saelens_is_its_library(runs):
    card = ModelCard(card_of(runs))
    assert card.data.get("library_name") == "saelens"
    assert "granary" in card.data.get("tags")
    assert card.data.get("base_model") is None  # "made-up" is on no hub
    assert 'SAE.from_pretrained("owner/saes", "masked_seed0")' in card.text
    assert "blocks.1.hook" in card.text
    assert "masked 0.5" in card.text


def test_the_card_says_how_much_was_masked_and_by_what(runs):
    card = card_of(runs).replace("\\", "")
    assert "| masked 0.5 | 50% of each batch | masked | 0.3 of the tokens by '...' | all | self |" in card
    path = runs / "masked_seed0/run.json"
    facts = json.loads(path.read_text())
    facts["cache"]["variant"] |= {"kind": "random", "mask_string": ""}
    path.write_text(json.dumps(without_seal(facts)))
    assert "0.3 of the tokens by random tokens" in card_of(runs)
    path.write_text(json.dumps(without_seal(facts) | {"cache": facts["cache"] | {"variant": {"kind": "mask"}}}))
    with pytest.raises(UserError, match=r"cache\.variant\.mask_prob is None, which cannot be"):
        card_of(runs)
    del facts["cache"]["variant"]  # as in the runs of before
    path.write_text(json.dumps(without_seal(facts)))
    assert "| masked | unknown | all | self |" in card_of(runs).replace("\\", "")


def test_the_card_has_mean_and_interval_over_seeds(runs):
    for seed, value in ((0, 0.5), (1, 0.7)):
        report(runs / f"masked_seed{seed}", explained_variance=value, ce_loss_score=None)
    report(runs / "topk", explained_variance=0.25)
    card = card_of(runs)
    mean, low, high = interval([0.5, 0.7])
    assert row(card, "| batchtopk | 32 | 3 | masked 0.5 | 2")[
        -1
    ] == f"{mean:.4g} \\({low:.4g} to {high:.4g}\\)".replace("-", "\\-")
    assert row(card, "| topk")[-1] == "0.25"
    assert "ce_loss_score" not in card.replace("\\", "")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_the_interval_is_the_one_that_evaluate_computes(values):
    found = paired_test(values)
    assert interval(values) == pytest.approx((found.mean, found.low, found.high))
    assert math.isnan(interval(values[:1])[1])


def test_without_reports_the_card_says_what_training_measured(runs):
    report(runs / "topk", explained_variance=0.25)  # not of all: those of others would be compared with this
    card = card_of(runs)
    held_out = json.loads((runs / "topk/run.json").read_text())["held_out"]
    assert row(card, "| topk")[-1] == f"{held_out['explained_variance']:.4g}".replace("-", "\\-")
    assert "has not measured all of them" in card


def test_runs_of_other_settings_are_no_seeds_of_each_other(runs):
    facts = json.loads((runs / "masked_seed1/run.json").read_text())
    facts["config"]["lr"] = 0.5
    (runs / "masked_seed1/run.json").write_text(json.dumps(without_seal(facts)))
    card = card_of(runs).replace("\\", "")
    assert "| masked 0.5 | lr 0.5 | 1 |" in card
    assert "95 %" not in card


def test_text_of_a_run_cannot_become_markup(runs):
    for run in runs.iterdir():
        facts = json.loads((run / "run.json").read_text())
        facts["cache"]["model"] = facts["recipe"] = "<img src=x>\n# [free](http://x) | `rm`\n```"
        (run / "run.json").write_text(json.dumps(without_seal(facts)))
    card = card_of(runs)
    assert card.count("\n# ") == 1
    assert card.count("```") == 2
    bare = re.sub(r"\\.", "", card)  # without what is escaped
    for mark in ("<img", "](", "free]", "`rm`"):
        assert mark not in bare


def test_a_dry_run_names_every_file_shows_the_card_and_asks_the_hub_nothing(runs, store, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    command(runs, "--repo", "owner/saes", "--dry-run")
    shown = capsys.readouterr().out
    weights = runs / "topk/sae_weights.safetensors"
    assert f"{weights.stat().st_size:>15,}  topk/sae_weights.safetensors\n" in shown
    assert card_of(runs) in shown
    assert store.requests == []


def test_the_command_pushes_says_how_to_load_and_keeps_the_token(runs, store, capsys):
    command(runs / "topk", "--repo", "owner/saes", "--private")
    shown = capsys.readouterr()
    assert "SAE.from_pretrained('owner/saes', 'topk')" in shown.out
    assert "hf_owners" not in shown.out + shown.err
    assert store.repos[KEY].private


def test_a_second_push_replaces_what_changed_and_keeps_the_rest(runs, store):
    push(runs)
    report(runs / "topk", explained_variance=0.25)
    push(runs)
    assert sorted(store.repos[KEY].commits[1]) == ["topk/report.json"]


def unfinished(runs: Path) -> None:
    facts = json.loads((runs / "topk/run.json").read_text())
    (runs / "topk/run.json").write_text(json.dumps({**without_seal(facts), "status": "training"}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unfinished, "is not finished"),
        (lambda runs: (runs / "topk/sae_weights.safetensors").write_bytes(b"x"), "is damaged"),
        (lambda runs: (runs / "topk/secret.txt").write_text("x"), r"holds secret\.txt, which is no file of a run"),
        (lambda runs: (runs / "novel.txt").write_text("x"), r"holds novel\.txt, which is no run"),
        (lambda runs: (runs / "topk").rename(runs / "top k"), "can be no name of an SAE"),
        (lambda runs: (runs / "topk/report.json").write_text("{"), "cannot be read as JSON"),
        (lambda runs: shutil.rmtree(runs), "there is no folder"),
    ],
)
def test_what_is_no_finished_run_is_refused_before_anything_is_sent(runs, store, spoil, said):
    spoil(runs)
    with pytest.raises(UserError, match=said):
        command(runs, "--repo", "owner/saes")
    assert store.requests == []


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"model.bin": b"x"}, r"holds 'model\.bin', which is not in these runs"),
        ({"README.md": b"# My notes"}, "was not made by granary"),
        ({"README.md": b'---\ntags: ["granary"]\n---\n', "other/cfg.json": b"{}"}, "holds 'other/cfg.json'"),
    ],
)
def test_a_repository_of_something_else_is_left_alone(runs, store, there, said):
    store.repos[KEY] = Repo(files={".gitattributes": b"", **there})
    with pytest.raises(CacheConflict, match=said):
        push(runs)
    assert store.repos[KEY].commits == []


def test_a_name_that_is_not_ours_or_is_public_is_refused(runs, store, monkeypatch):
    store.repos[KEY] = Repo()
    with pytest.raises(UserError, match="is there and public"):
        push(runs, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_others")
    with pytest.raises(HubError, match="is not yours"):
        push(runs)
    with pytest.raises(UserError, match="give owner/name"):
        command(runs, "--repo", "saes")
    assert store.repos[KEY].commits == []


def test_the_commands_of_the_page_parse():
    page = (Path(__file__).parent.parent / "docs" / "hub.md").read_text()
    lines = [line.split() for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert {tuple(words[:3]) for words in lines} == {("python", "-m", "train"), ("python", "-m", "cache_spec")}
    for words in lines:
        if words[2] == "train":
            assert words[3] == "push"
            get_command(app).make_context("push", words[4:])
        else:
            commands = get_command(cache_app)
            commands.commands[words[3]].make_context(words[3], words[4:])
