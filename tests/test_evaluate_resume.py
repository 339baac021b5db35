"""Going on: what was measured is taken again, byte for byte, exactly while nothing that decides it has changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_fixtures import no_model, small_cache, write_four_runs
from safetensors.torch import load_file, save_file

from cache_spec import DiskFull
from evaluate import kept, measuring
from evaluate.command import run
from train.run_folder import without_seal

# Measures core and stability; a third argument is how many cases are measured before the process hangs.
SCRIPT = """
import sys, time
from pathlib import Path
from evaluate import measuring
from evaluate.command import run

folder, n = Path(sys.argv[1]), int(sys.argv[2])
real, seen = measuring._measure_case, []

def slow(*arguments):
    if len(seen) == n:
        print("waiting", flush=True)
        time.sleep(600)
    seen.append(1)
    return real(*arguments)

measuring._measure_case = slow
run(folder, out=folder, metrics="core,stability")
"""


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Two seeds, masked and not; 9 cases with their controls."""
    no_model(monkeypatch)
    return write_four_runs(tmp_path / "runs", small_cache(tmp_path / "cache"))


def evaluate(folder: Path, **options: object) -> None:
    run(folder, **{"metrics": "core,stability", "out": folder, **options})  # pyright: ignore[reportArgumentType]


def reports(folder: Path) -> dict[str, bytes]:
    """Every report under a folder, and the page."""
    files = [*folder.rglob("report.json"), *folder.rglob("controls/*.json"), folder / "report.html"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def n_measured(monkeypatch) -> list[str]:
    """The cases that are measured from now on, by name."""
    real, names = measuring._measure_case, []

    def counting(case, *arguments):
        names.append(case.name)
        return real(case, *arguments)

    monkeypatch.setattr(measuring, "_measure_case", counting)
    return names


def process(folder: Path, n: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(n)]
    root = Path(__file__).parent.parent
    return subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)


def test_fresh_processes_give_the_same_bytes_killed_half_way_or_not(runs, tmp_path):
    """One process is killed with -9 after three cases and another goes on; a third does all of it at once."""
    killed = shutil.copytree(runs, tmp_path / "killed" / "runs")
    with process(killed, 3) as first, process(runs, 99) as whole:
        assert first.stdout is not None
        assert any("waiting" in line for line in first.stdout)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert len(list(killed.glob("*/report.json"))) == 3
        assert not (killed / "report.json").exists()
        with process(killed, 99) as second:
            assert "3 of 9 were measured before by this same code" in second.communicate()[0]
        whole.communicate()
    assert (second.returncode, whole.returncode) == (0, 0)
    assert reports(killed) == reports(runs)


def test_ctrl_c_keeps_what_was_measured(runs, monkeypatch, n_measured, capsys):
    counting = measuring._measure_case

    def interrupted(case, *arguments):
        if len(n_measured) == 2:
            raise KeyboardInterrupt
        return counting(case, *arguments)

    monkeypatch.setattr(measuring, "_measure_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(runs)
    assert {file.parent.name for file in runs.glob("*/report.json")} == set(n_measured)
    assert not list(runs.rglob("*.partial"))
    monkeypatch.setattr(measuring, "_measure_case", counting)
    evaluate(runs)
    assert len(n_measured) == len(set(n_measured)) == 9
    assert "2 of 9 were measured before" in capsys.readouterr().out


def test_a_second_time_nothing_is_measured_and_nothing_changes(runs, n_measured):
    evaluate(runs)
    first = reports(runs)
    times = {file: file.stat().st_mtime_ns for file in runs.glob("*/report.json")}
    n_measured.clear()
    evaluate(runs)
    assert n_measured == []
    assert reports(runs) == first
    assert times == {file: file.stat().st_mtime_ns for file in runs.glob("*/report.json")}
    evaluate(runs, fresh=True)
    assert len(n_measured) == 9
    assert reports(runs) == first


def change_weights(runs: Path) -> None:
    file = next(runs.glob("*unmasked_seed0/sae_weights.safetensors"))
    tensors = load_file(file)
    tensors["W_dec"][0] = -tensors["W_dec"][0]
    save_file(tensors, file)
    facts = json.loads(file.with_name("run.json").read_text())  # whose checksums would refuse it
    file.with_name("run.json").write_text(json.dumps({**without_seal(facts), "files": {}}))


def spoil_report(runs: Path) -> None:
    file = next(runs.glob("*unmasked_seed0/report.json"))
    file.write_text(file.read_text()[:-40])


def change_run_file(runs: Path) -> None:
    file = next(runs.glob("*unmasked_seed0/run.json"))
    file.write_text(json.dumps({**without_seal(json.loads(file.read_text())), "norm_factor": 2.0}))


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        # its own report, its shuffled twin's, and the other seed's, which is compared with it
        (change_weights, {"unmasked_seed0", "permuted decoder batchtopk seed0", "unmasked_seed1"}),
        (spoil_report, {"unmasked_seed0"}),
        (
            change_run_file,
            {
                "unmasked_seed0",
                "permuted decoder batchtopk seed0",
                "random, L0 matched batchtopk seed0",
                "untrained batchtopk seed0",
            },
        ),
    ],
)
def test_only_what_a_change_decides_is_measured_again(runs, n_measured, change, measured):
    evaluate(runs)
    n_measured.clear()
    change(runs)
    evaluate(runs)
    assert {name.removeprefix("batchtopk_") for name in n_measured} == measured


def test_another_seed_metric_code_or_number_of_threads_is_measured_again(runs, n_measured, monkeypatch):
    evaluate(runs)
    for options in ({"seed": 1}, {"metrics": "core"}):
        n_measured.clear()
        evaluate(runs, **options)
        assert len(n_measured) == 9
    for name, value in (("code_hash", lambda: "other"), ("torch.get_num_threads", lambda: 99)):
        n_measured.clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"evaluate.kept.{name}", value)
            evaluate(runs, metrics="core")
        assert len(n_measured) == 9


def test_the_hash_of_the_code_is_of_every_file_that_measures(tmp_path, monkeypatch):
    """Of all packages, but not of what compares and shows numbers that are there."""
    measures = ("evaluate/metrics/core.py", "evaluate/report.py", "harvest/model.py", "harvest/embedded/build.py")
    measures += ("train/sae.py", "train/architectures/topk.py", "cache_spec/cache.py")
    shows = ("evaluate/page.py", "evaluate/wording.py", "evaluate/compare.py")
    for file in (*measures, *shows):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("a = 1")
    monkeypatch.setattr(kept, "ROOT", tmp_path)

    def fresh_hash() -> str:
        kept.code_hash.cache_clear()
        return kept.code_hash()

    seen = {first := fresh_hash()}
    for file in shows:
        (tmp_path / file).write_text("a = 2")
        assert fresh_hash() == first
    for file in measures:
        (tmp_path / file).write_text("a = 2")
        assert fresh_hash() not in seen
        seen.add(fresh_hash())
    monkeypatch.undo()
    kept.code_hash.cache_clear()


def test_what_is_not_hashed_is_there_and_what_measures_imports_none_of_it_but_for_reports():
    """statistics and compare say what a report over all runs holds; no number of a case comes from them."""
    for name in kept._SHOWN:
        module = Path(name).stem
        assert (kept.ROOT / name).is_file()
        for file in (kept.ROOT / "evaluate").rglob("*.py"):
            if file.relative_to(kept.ROOT).as_posix() not in {
                *kept._SHOWN,
                "evaluate/report.py",
                "evaluate/recipes.py",
            }:
                assert f"from evaluate.{module} import" not in file.read_text(), file


@pytest.mark.parametrize("library", kept.LIBRARIES)
def test_another_version_of_a_library_is_another_fingerprint(monkeypatch, library):
    def mark() -> str:
        return kept.fingerprint({}, device="cpu", metrics=["core"], seed=0)

    before, real = mark(), kept.version
    monkeypatch.setattr(kept, "version", lambda name: "other" if name == library else real(name))
    assert mark() != before


def test_a_new_run_with_another_setting_renames_recipes_and_measures_itself_alone(runs, n_measured, tmp_path):
    evaluate(runs)
    one = next(runs.glob("*unmasked_seed0"))
    other = shutil.copytree(one, runs / "other_lr")
    (other / "report.json").unlink()
    for folder, lr in ((one, 0.001), (other, 0.0003)):
        facts = json.loads((folder / "run.json").read_text())
        facts["config"]["lr"] = lr
        (folder / "run.json").write_text(json.dumps({**without_seal(facts), "name": folder.name}))
    n_measured.clear()
    evaluate(runs)
    assert {"other_lr", one.name} <= set(n_measured)
    assert not any("masked_0.5" in name for name in n_measured)
    assert json.loads((one / "report.json").read_text())["settings"] == "lr 0.001"


def test_numbers_come_back_as_they_were(runs, n_measured, monkeypatch):
    seen: list[list] = []
    real = measuring.result_of
    monkeypatch.setattr(measuring, "result_of", lambda case, found: seen[-1].append(real(case, found)) or seen[-1][-1])
    for _ in range(2):
        seen.append([])
        evaluate(runs)
    for first, second in zip(*seen, strict=True):
        assert first.values.keys() == second.values.keys()
        np.testing.assert_array_equal(list(first.values.values()), list(second.values.values()))
        assert first.profiles == second.profiles


def test_a_folder_that_cannot_be_written_to_gets_one_sentence_and_is_measured(runs, capsys, n_measured):
    blocked = next(runs.glob("*unmasked_seed0"))
    (blocked / "report.json").mkdir()  # stands for a read-only folder, which root may write to
    evaluate(runs)
    printed = capsys.readouterr().out
    assert printed.count("cannot be written to (Is a directory), so it is measured again") == 1
    assert str(blocked) in printed
    report = json.loads((runs / "report.json").read_text())
    assert blocked.name in {result["run"] for result in report["runs"]}


def test_a_full_disk_stops_with_its_sentence(runs, monkeypatch):
    def full(path, data):
        raise DiskFull("the disk is full")

    monkeypatch.setattr(kept, "write_file", full)
    with pytest.raises(DiskFull, match="the disk is full"):
        evaluate(runs)


def test_measuring_does_not_change_the_callers_threads(runs):
    before, start = torch.get_num_threads(), time.monotonic()
    evaluate(runs, metrics="core")
    assert torch.get_num_threads() == before
    assert time.monotonic() - start < 60
