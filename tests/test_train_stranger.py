"""SAEs and runs from a stranger: no link is followed, no number in a file decides the memory, no code is run."""

import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_fixtures import bounded, everything, spelled
from fuzz_runs import SHORT, STOPPED, use_runs, use_sae
from fuzz_targets import target
from safetensors.torch import load_file, save_file
from train_fixtures import run_config

from cache_spec import ActivationCache, UserError
from evaluate.runs import RunsIncomplete, find_runs
from train.checkpoint import checkpoint_step, last_logged, restore_checkpoint
from train.foreign import read_folder
from train.formats import sparsify
from train.kernels import select
from train.known import check_facts, check_report
from train.loader import MixedBatchLoader
from train.pushing import read_report, read_runs
from train.report import print_results
from train.run_folder import check_out, holds_files, load_run, read_facts
from train.step import TrainRun
from train.sweep import failures_sentence, train_sweep

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    target("run.json", folder)
    return folder


@pytest.fixture
def runs(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "runs", tmp_path / "runs"))


@pytest.fixture
def sae(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "saelens", tmp_path / "sae"))


def edit(path: Path, **changes: Any) -> None:
    path.write_bytes(spelled({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize("file", ["run.json", "cfg.json", "sae_weights.safetensors", "log.jsonl"])
def test_a_link_in_a_run_is_refused_by_name(runs, tmp_path, file):
    run = runs / "topk"
    shutil.move(run / file, tmp_path / "outside")
    (run / file).symlink_to(tmp_path / "outside")
    before = everything(tmp_path)
    for use in (load_run, read_facts, read_runs, read_folder):
        with pytest.raises(UserError, match=rf"{file} is a link"):
            use(run)
    _, left_out = find_runs(runs)
    assert "is a link" in left_out["topk"]
    assert everything(tmp_path) == before


def test_a_run_that_is_a_link_gets_no_report_where_it_leads(runs, tmp_path):
    shutil.move(runs / "topk", tmp_path / "outside")
    (runs / "topk").symlink_to(tmp_path / "outside")
    found, left_out = find_runs(runs)
    assert [run.name for run in found] == ["batchtopk"]
    assert "a link" in left_out["topk"]
    (tmp_path / "here").symlink_to(tmp_path / "outside")
    assert [run.name for run in find_runs(tmp_path / "here")[0]] == ["topk"]  # whoever names it knows it


def test_a_state_that_leads_elsewhere_is_not_trained_into(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/state").symlink_to(tmp_path / "outside")
    assert holds_files(tmp_path / "runs/run")
    with pytest.raises(UserError, match="holds run and no runs"):
        check_out(tmp_path / "runs")


def test_an_sae_in_the_hubs_cache_has_links_to_its_blobs_and_to_nothing_else(sae, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sae.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_folder(snapshot).sae.d_sae == 32
    (snapshot / "cfg.json").unlink()
    (tmp_path / "secret").write_text("{}")
    (snapshot / "cfg.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="a link out of the hub's cache"):
        read_folder(snapshot)


def test_a_pipe_in_an_sae_is_not_waited_for(sae):
    (sae / "cfg.json").unlink()
    os.mkfifo(sae / "cfg.json")
    with bounded(), pytest.raises(UserError, match="neither a file nor a folder"):
        read_folder(sae)


@pytest.mark.parametrize(
    "changes", [{"d_in": 10**9}, {"d_sae": 10**12}, {"d_in": 2**31, "d_sae": 2**31}, {"d_sae": 10**39}]
)
def test_a_cfg_that_wants_a_terabyte_gets_none(runs, sae, changes):
    for folder, read in ((runs / "topk", load_run), (sae, read_folder)):
        edit(folder / "cfg.json", **changes)
        with bounded(), pytest.raises(UserError, match=r"shape|d_sae"):
            read(folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architecture": ["topk"]}, "architecture"),
        ({"architecture": "skip_topk"}, "damaged"),
        ({"metadata": []}, "metadata|training_architecture_details"),
        ({"metadata": {"training_architecture_details": {"matryoshka_widths": [32, 8]}}}, "widths"),
        ({"metadata": {"training_architecture_details": {"matryoshka_widths": [8, 16]}}}, "widths end elsewhere"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input"),
        ({"k": 33}, "k is 33"),
        ({"k": "3"}, "k is '3'"),
        ({"d_in": True}, "d_in is True"),
    ],
)
def test_a_run_whose_cfg_says_what_cannot_be_is_damaged(runs, changes, word):
    edit(runs / "topk/cfg.json", **changes)
    with pytest.raises(UserError, match=word):
        load_run(runs / "topk")


def test_a_header_of_safetensors_that_is_longer_than_any_is_refused(sae):
    weights = sae / "sae_weights.safetensors"
    for n in (2**63, 2**40, 10**8 + 1, 0):
        weights.write_bytes(struct.pack("<Q", n) + b"{}")
        with bounded(), pytest.raises(UserError, match=r"cannot be read|lack"):
            read_folder(sae)


def test_numbers_of_a_type_that_torch_has_not_are_refused(sae):
    weights = sae / "sae_weights.safetensors"
    save_file({"W_enc": torch.zeros(4, dtype=torch.uint8)}, weights)
    weights.write_bytes(weights.read_bytes().replace(b'"U8"', b'"X8"'))
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(sae)


def test_a_threshold_that_is_spread_over_latents_that_are_not_there_takes_no_memory(sae):
    tensors = load_file(sae / "sae_weights.safetensors")
    tensors["topk_threshold"] = torch.tensor(0.1)
    tensors.pop("threshold", None)
    save_file(tensors, sae / "sae_weights.safetensors")
    edit(sae / "cfg.json", d_sae=2**33)
    with bounded(n_bytes=2**30), pytest.raises(UserError, match="shape"):
        read_folder(sae)


def test_an_ae_pt_that_unpacks_to_more_than_it_is_or_repeats_a_number_is_refused(made, tmp_path):
    folder = Path(shutil.copytree(made / "dictionary_learning", tmp_path / "sae"))
    true = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**true, "b_dec": torch.zeros(1).expand(2**40)}, folder / "ae.pt")
    with bounded(), pytest.raises(UserError, match="not a dict of tensors"):
        read_folder(folder)
    torch.save(true, folder / "ae.pt")
    packed = io.BytesIO()
    with zipfile.ZipFile(folder / "ae.pt") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("archive/data/9", bytes(2**24))
    (folder / "ae.pt").write_bytes(packed.getvalue())
    with bounded(), pytest.raises(UserError, match="would unpack to"):
        read_folder(folder)


@pytest.mark.parametrize(
    "name",
    ["layers.1./../../../../tmp/x", "layers.1.a/b", "/layers.1", "layers.1.\n", "layers." + "1" * 300, "layers.1.."],
)
def test_an_export_stays_in_its_folder_whatever_the_hook_point_is_called(made, name):
    stored = read_folder(made / "runs/topk")
    stored.metadata.update(hf_hook_name=name, hook_name=name)
    made_of_it = sparsify.write(stored)
    assert made_of_it.subfolder in ("sae", "layers.1")
    assert Path(made_of_it.subfolder).name == made_of_it.subfolder


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"config": []}, "config is"),
        ({"cache": "x"}, "cache is"),
        ({"status": 1}, "no status"),
        ({"held_out": [1]}, "held_out is"),
    ],
)
def test_a_run_json_whose_parts_are_something_else_is_refused_by_all(runs, changes, word):
    edit(runs / "topk/run.json", **changes)
    for read in (load_run, read_runs, read_folder):
        with pytest.raises(UserError, match=word):
            read(runs / "topk")
    use_runs(runs)


@pytest.mark.parametrize("file", ["topk/run.json", "topk/cfg.json", "topk/report.json", "report.json"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_not_is_not_pushed(runs, file, number):
    edit(runs / file, calibration={"x": number})
    read = read_report if file == "report.json" else read_runs
    with pytest.raises(UserError, match=f"{Path(file).name}.*is no number"):
        read(runs)
    use_runs(runs)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        *(({name: ["x"]}, f"{name} is .*no text") for name in ("name", "recipe", "kernel", "spread")),
        *(({name: None}, f"{name} is None, which is no text") for name in ("kernel", "spread")),
        *(({name: math.nan}, "NaN is no number") for name in ("norm_factor", "anything")),
        *(({"norm_factor": value}, "holds another run: norm_factor") for value in (0, True, "1", None, 10**39, 3.0)),
        ({"target_norm_factor": 3.0}, "holds another run: target_norm_factor"),
        ({"name": "other"}, "holds another run: name"),
        ({"status": "training "}, "no status that a run can have"),
        ({"tokens_seen": "0"}, "tokens_seen"),
    ],
)
def test_what_training_goes_on_with_is_looked_at_first(made, tmp_path, changes, word):
    runs = Path(shutil.copytree(made / "sweep", tmp_path / "runs"))
    edit(runs / "stopped/run.json", **changes)
    loader, before = MixedBatchLoader(ActivationCache.open(made / "training_cache"), SHORT), everything(runs)
    with pytest.raises(UserError, match=word):
        train_sweep(loader, STOPPED, out=runs, resume=True)
    assert everything(runs) == before


def test_a_failed_run_that_says_nothing_of_how_has_its_line(made, tmp_path, capsys):
    runs = Path(shutil.copytree(made / "sweep", tmp_path / "runs"))
    loader = MixedBatchLoader(ActivationCache.open(made / "training_cache"), SHORT)
    for failure in (None, {}, {"step": "x", "checkpoint": []}, {"step": None, "reason": "x" * 5000}):
        edit(runs / "failed/run.json", failure=failure, held_out={"l0": "x", "n_dead": None}, calibration={"x": []})
        facts = train_sweep(loader, STOPPED, out=runs, resume=True)
        print_results(facts, runs)
        assert len(failures_sentence(facts)) < 500
    assert "failed at step 0" in capsys.readouterr().out


def test_what_the_page_of_a_run_tells_is_there_before_it_is_told(runs):
    facts = json.loads((runs / "topk/run.json").read_bytes())
    check_facts(facts, "run.json")
    with pytest.raises(UserError, match=r"config\.seed is None"):
        check_facts({**facts, "config": {}} | {"config": {"d_sae": 1, "k": 1}}, "run.json")
    with pytest.raises(UserError, match=r"cache\.target\.tl_name is None"):
        check_facts({**facts, "cache": {**facts["cache"], "target": [1]}}, "run.json")
    for metrics in ([], {"core": 1}):
        with pytest.raises(UserError, match="metrics"):
            check_report({"metrics": metrics}, "report.json")


def test_a_page_tells_of_runs_without_versions(runs):
    edit(runs / "topk/run.json", versions=None)
    use_runs(runs)


def test_strange_names_in_a_state_are_no_checkpoints(made, tmp_path):
    state = Path(shutil.copytree(made / "stopped", tmp_path / "run")) / "state"
    for name in ("step_x.json", "step_-00000001.json", "step_٣٣٣٣٣٣٣٣٣.json", "step_" + "9" * 200 + ".json"):
        (state / name).write_text("{}")
    assert checkpoint_step(tmp_path / "run") == 2


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": "x"}', "{" * 5000, "\x00", '{"step": 1e999}', "9" * 5000])
def test_a_line_of_the_log_that_is_none_ends_it(made, tmp_path, line):
    folder = Path(shutil.copytree(made / "stopped", tmp_path / "run"))
    with (folder / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    assert last_logged(folder) == {}
    run = TrainRun(run_config(), 8, 60, select("dense", "cpu"))
    restore_checkpoint(folder, run)
    assert run.n_done == 2
    assert (folder / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_runs_at_all_is_a_sentence(runs):
    for run in ("topk", "batchtopk"):
        (runs / run / "run.json").write_bytes(b"9" * 5000)
    with pytest.raises(RunsIncomplete, match="is not JSON"):
        find_runs(runs)


CANARY = "import pathlib\npathlib.Path({place!r}).touch()\n"


def test_nothing_that_lies_in_a_folder_is_run(made, runs, sae, tmp_path):
    """Code in every place where Python, torch or transformers might look for some."""
    place = tmp_path / "ran"
    code = CANARY.format(place=str(place))
    folders = (sae, runs, runs / "topk", Path(shutil.copytree(made / "training_cache", tmp_path / "cache")))
    for folder in folders:
        for name in (
            "__init__.py",
            "modeling.py",
            "sitecustomize.py",
            "conftest.py",
            "torch.py",
            "json.py",
            "sae_lens.py",
        ):
            (folder / name).write_text(code)
        (folder / "evil.pth").write_text("import os; os.mkdir(" + repr(str(place)) + ")")
    auto = {"auto_map": {"AutoModel": "modeling.Model"}, "trust_remote_code": True, "architectures": ["modeling"]}
    edit(sae / "cfg.json", **auto, activation_fn=None)
    commands = (
        ["-m", "cache_spec", "info", str(tmp_path / "cache")],
        ["-m", "cache_spec", "verify", str(tmp_path / "cache")],
        ["-m", "train", "import", str(sae)],
        ["-m", "train", "push", str(runs), "--repo", "a/b", "--dry-run"],
    )
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1, 2), done.stderr
        assert "Traceback" not in done.stderr
    use_sae(sae)
    use_runs(runs)
    assert not place.exists()
