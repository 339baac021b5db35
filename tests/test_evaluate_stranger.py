"""Runs and SAEs from a stranger: what evaluate prints of them cannot move the cursor or turn the text around."""

import json
from pathlib import Path

import pytest
from evaluate_fixtures import no_model, small_cache, small_sae, write_run

from cache_spec.files import seal
from cache_spec.progress import Progress
from evaluate.command import run
from evaluate.kept import MEASURED, read_kept
from evaluate.runs import RunsIncomplete
from train.exported import write_folder
from train.foreign import read_folder
from train.names import find

OWNED = "\x1b[2J\x1b]0;owned\x07\u202eevil\x9b1m\r"
UNSAFE = {"\x1b", "\x07", "\u202e", "\x9b", "\r"}


def test_no_name_that_a_stranger_chose_moves_the_cursor(tmp_path, monkeypatch, capsys):
    no_model(monkeypatch)
    cache, runs = small_cache(tmp_path / "cache"), tmp_path / "runs"
    for seed in range(2):
        for masked in (0.0, 0.5):
            facts = {"recipe": f"recipe {masked} {OWNED}\tof two\nlines", "name": f"name{OWNED}"}
            where = write_run(runs, cache, small_sae(seed + 10 * (masked > 0)), seed=seed, masked=masked)
            stated = json.loads((where / "run.json").read_text())
            config = stated["config"] | {"optimizer": f"setting {seed} {OWNED}"}
            del stated["crc32c"]
            (where / "run.json").write_text(json.dumps(stated | facts | {"config": config}))
    (runs / f"left out{OWNED}").mkdir()
    (runs / f"left out{OWNED}" / "run.json").write_text("{}")
    theirs = tmp_path / f"theirs{OWNED}"
    write_folder(theirs, find("formats", "saelens").write(read_folder(where), approximate=False, k=None).files)
    described = json.loads((theirs / "cfg.json").read_text())
    described["metadata"] |= {"training_architecture": f"theirs{OWNED}", "hook_name": f"blocks.1{OWNED}"}
    (theirs / "cfg.json").write_text(json.dumps(described))
    with pytest.raises(RunsIncomplete):
        run(runs, out=tmp_path / "out", metrics="core", saes=[str(theirs)], cache=cache.path, hook="layer_1")
    told, progress = capsys.readouterr()
    assert not UNSAFE & set(told + progress)
    for name in ("recipe 0.5 ", "setting 1 ", "left out", "theirs"):
        assert f"{name}\\x1b[2J" in told, name
    assert "\\x1b[2J" in progress
    assert "of two lines" in told, "a name has one line of the table"


def test_a_name_and_a_note_beside_the_progress_are_spelled_out(capsys):
    with Progress(f"evaluate {OWNED}", 1, "SAEs") as progress:
        progress.advance(note=OWNED)
    told = capsys.readouterr().err
    assert told.count("owned") == 2
    assert not UNSAFE & set(told)


def test_a_norm_factor_that_overflows_float32_leaves_a_report(tmp_path, monkeypatch):
    no_model(monkeypatch)
    where = write_run(tmp_path / "runs", small_cache(tmp_path / "cache"), small_sae(0))
    facts = json.loads((where / "run.json").read_text()) | {"norm_factor": 1e150}
    del facts["crc32c"]
    (where / "run.json").write_text(json.dumps(facts))
    run(tmp_path / "runs", out=tmp_path / "out", metrics="core")
    assert json.loads((where / "report.json").read_text())["threshold"]["trained"] == pytest.approx(0.1)
    controls = (tmp_path / "out/.evaluate/controls").glob("*.json")
    assert None in {json.loads(control.read_text())["threshold"]["trained"] for control in controls}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A run that was measured."""
    folder = tmp_path_factory.mktemp("measured")
    where = write_run(folder / "runs", small_cache(folder / "cache"), small_sae(0))
    with pytest.MonkeyPatch.context() as patch:
        no_model(patch)
        run(where, out=folder / "out", metrics="core")
    return where


BAR = {"child": "c", "n": 1, "firing": 0.5, "absorbed": 0.5, "absorber": ""}
EXAMPLE = {"family": "f", "parent": "p", "latents": [1], "bars": [BAR]}


def test_a_kept_report_is_taken_as_far_as_it_was_measured(measured):
    report = json.loads((measured / "report.json").read_text())
    kept = read_kept(measured / "report.json", report["fingerprint"])
    assert kept == {name: report[name] for name in MEASURED}
    assert not set(MEASURED) & {"run", "seed", "settings", "fingerprint"}


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("metrics", "profiles") for value in (None, "x", [], {"x": None}, {"x": "y"})),
        *({"metrics": {"core": {"l0": value}}} for value in ("3", [], {}, 10**39)),
        *({"profiles": {"x": [value]}} for value in ("3", [], {}, 10**39)),
        *({"l0": value} for value in ("3", [], {}, 10**39)),
        *({"example": value} for value in ("x", [], {}, {**EXAMPLE, "bars": [{}]}, {**EXAMPLE, "latents": ["x"]})),
        *({"example": {**EXAMPLE, "bars": [{**BAR, "firing": value}]}} for value in ("x", None, [], 1e308, -1.0)),
    ],
)
def test_a_kept_report_that_says_what_no_report_says_is_measured_again(measured, tmp_path, changes):
    """With a checksum that fits: who changed it knows how to make one."""
    facts = json.loads((measured / "report.json").read_text())
    del facts["crc32c"]
    whole, path = facts | {"example": EXAMPLE}, tmp_path / "report.json"
    path.write_text(json.dumps(seal(whole)))
    assert read_kept(path, whole["fingerprint"]) is not None
    path.write_text(json.dumps(seal(whole | changes)))
    assert read_kept(path, whole["fingerprint"]) is None
    path.write_text(json.dumps(seal({name: fact for name, fact in whole.items() if name not in changes})))
    assert read_kept(path, whole["fingerprint"]) is None
