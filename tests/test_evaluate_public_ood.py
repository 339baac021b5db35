"""The public out-of-distribution sets: read from a stand-in package, and counted in the real one where it is."""

import csv
import io
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numcodecs import Zstd

from cache_spec import UserError
from evaluate.labelled_text import TextTask
from evaluate.public_ood import PACKAGE, TASKS, public_tasks

PAGE = Path(__file__).parent.parent / "docs" / "probing.md"


def write_set(path: Path, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["prompt", "prompt_len", "target"])
    writer.writerows([prompt, len(prompt), target] for prompt, target in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(Zstd().encode(text.getvalue().encode())))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of the same name and layout; importing it fails."""
    folder = tmp_path / PACKAGE
    for name in TASKS:
        first, second = ("bigram", "not_bigram") if name[:2] in ("66", "67", "73") else ("0", "1")
        usual = [(f"{name}, {label}\n number {i}", label) for i in range(40) for label in (first, second)]
        shifted = [(f"shifted {i}", label) for i in range(5) for label in (first, second)]
        if name.startswith("90"):
            shifted = [(text, "1" if label == "0" else "not_entailment") for text, label in shifted]
        write_set(folder / "data" / "cleaned_data" / f"{name}.csv.zst", usual)
        write_set(folder / "data" / "OOD data" / f"{name}_OOD.csv.zst", shifted)
    (folder / "__init__.py").write_text("raise RuntimeError('its code is not to be run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    return folder


def test_all_eight_sets_are_read_without_running_the_package(package):
    tasks = public_tasks()
    assert [task.name for task in tasks] == list(TASKS)
    for task in tasks:
        assert (task.origin, len(task.classes), dict(task.left_out)) == ("sae-probes", 2, {})
        assert {part: np.bincount(labels).tolist() for part, labels in task.labels.items()} == {
            "train": [30, 30],
            "test": [10, 10],
            "ood": [5, 5],
        }
        assert not set(task.texts["train"]) & set(task.texts["test"])
        for text, label in zip(task.texts["train"], task.labels["train"], strict=True):
            assert f", {task.classes[label]}\n" in text
    assert PACKAGE not in sys.modules
    assert [task.texts for task in public_tasks()] == [task.texts for task in tasks]  # the same halves every time


def test_the_two_halves_of_qnli_name_their_classes_differently(package):
    """Entailment is 0 in the usual half (as in GLUE) and 1 in the shifted one, against 'not_entailment'."""
    task = public_tasks()[-1]
    assert task.classes == ("0", "1")
    assert task.labels["ood"].tolist() == [0, 1] * 5


def test_a_text_that_is_there_twice_is_taken_once_and_with_two_labels_not_at_all(package):
    name = "5_hist_fig_ismale"
    rows = [(f"name {i % 50} {label}", label) for i in range(100) for label in "01"]
    write_set(package / "data" / "cleaned_data" / f"{name}.csv.zst", [*rows, ("both", "0"), ("both", "1")])
    texts = public_tasks()[0].texts
    usual = [*texts["train"], *texts["test"]]
    assert len(usual) == len(set(usual)) == 100
    assert "both" not in usual


def test_what_is_missing_or_damaged_is_said(package, monkeypatch):
    path = package / "data" / "cleaned_data" / "5_hist_fig_ismale.csv.zst"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        public_tasks()
    path.unlink()
    with pytest.raises(UserError, match="is not there, so this sae-probes is another version"):
        public_tasks()
    monkeypatch.setattr("evaluate.public_ood.PACKAGE", "sae_probes_that_nobody_has")
    with pytest.raises(UserError, match="not installed; pip install --no-deps sae-probes"):
        public_tasks()


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="sae-probes is not installed")
def test_the_installed_package_has_the_numbers_of_the_page():
    def counted(task: TextTask) -> tuple[str, ...]:
        return (task.name, *(f"{len(task.texts[part]):,}" for part in ("train", "test", "ood")))

    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+[\w-]*)` \| ([\d,]+) / ([\d,]+) \| (\d+) \|$", page, re.MULTILINE) == [
        counted(task) for task in public_tasks()
    ]
