"""Labelled text: what is read back, what is refused and in which words, and the activations of texts."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_spec import HookPoint, UserError
from evaluate import labelled_text, text_rows
from evaluate.labelled_text import MIN_TRAIN, TextTask, read_labelled, read_plain_text
from evaluate.store import Store
from evaluate.text_rows import last_token_rows, make_text_tasks
from harvest import embedded
from harvest.model import LoadedModel, activations, load_model

PAGE = Path(__file__).parent.parent / "docs" / "probing.md"
HOOK = HookPoint.parse(embedded.HOOK_POINT)
ODD_TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('",\n\r\\\u2028\ufeff'), min_size=1, max_size=30
).filter(str.strip)


def rows_of(*, train: int = MIN_TRAIN, test: int = 3, ood: int = 0, labels: tuple = ("a", "b")) -> list[dict]:
    return [
        {"text": f"{part} {label} number {i}", "label": label, "split": part}
        for part, n in (("train", train), ("test", test), ("ood", ood))
        for i in range(n)
        for label in labels
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
@given(texts=st.lists(ODD_TEXT, min_size=1, max_size=4), extra=ODD_TEXT)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_texts_come_back_as_they_were_written(tmp_path, write, texts, extra):
    rows = [*rows_of(), *({"text": text, "label": "a", "split": "test"} for text in texts)]
    rows += [{"text": extra, "label": "b", "split": "ood"}, {"text": extra, "label": "a", "split": "ood"}]
    (task,) = read_labelled(write(tmp_path / f"task.{write.__name__.removeprefix('write_')}", rows))
    assert task.name == "task"
    for part, name in (("train", "train"), ("test", "test"), ("ood", "ood")):
        wanted = [row for row in rows if row["split"] == name]
        assert task.texts[part] == [row["text"] for row in wanted]
        assert [task.classes[i] for i in task.labels[part]] == [row["label"] for row in wanted]


def test_a_folder_gives_one_task_a_file_in_the_order_of_their_names(tmp_path):
    write_csv(tmp_path / "b.csv", rows_of())
    write_jsonl(tmp_path / "a.jsonl", rows_of(ood=2, labels=(0, 1, 10, 9)))
    (tmp_path / "notes.md").write_text("not a task")
    first, second = read_labelled(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    assert first.classes == ("0", "1", "9", "10")  # numbers by size
    assert set(first.texts) == {"train", "test", "ood"}
    assert set(second.texts) == set(second.labels) == {"train", "test"}


def test_a_number_is_the_label_that_it_looks_like(tmp_path):
    (numbers,) = read_labelled(write_jsonl(tmp_path / "a.jsonl", rows_of(labels=(1, 2.0))))
    (words,) = read_labelled(write_csv(tmp_path / "b.csv", rows_of(labels=("1", "2"))))
    assert numbers.classes == words.classes == ("1", "2")


def test_classes_with_too_few_texts_are_left_out_and_said(tmp_path):
    rows = [*rows_of(ood=1), *rows_of(train=MIN_TRAIN - 1, ood=1, labels=("rare",))]
    rows += [*rows_of(test=0, ood=1, labels=("untested",)), *rows_of(labels=("unshifted",))]
    (task,) = read_labelled(write_jsonl(tmp_path / "task.jsonl", rows))
    assert task.classes == ("a", "b")
    assert set(task.left_out) == {"rare", "untested", "unshifted"}
    assert f"the class 'rare' of the task task is left out: it has 19 train texts, and {MIN_TRAIN} are wanted" in (
        task.notes()
    )
    assert all(len(texts) == len(task.labels[part]) for part, texts in task.texts.items())
    assert not any("rare" in text for texts in task.texts.values() for text in texts)


def test_copies_of_train_texts_are_left_out_and_said(tmp_path):
    """Of a text that is there twice in train one is kept, or none if its labels disagree."""
    rows = rows_of(ood=3)
    more = [("twice", "a", "train"), ("twice", "a", "train"), ("twice", "b", "test"), ("twice", "a", "ood")]
    more += [("disputed", "a", "train"), ("disputed", "b", "train"), ("disputed", "a", "test")]
    rows += [{"text": text, "label": label, "split": part} for text, label, part in more]
    (task,) = read_labelled(write_jsonl(tmp_path / "task.jsonl", rows))
    assert [text for text in task.texts["train"] if "number" not in text] == ["twice"]
    assert [text for text in task.texts["test"] if "number" not in text] == ["disputed"]
    assert len(task.texts["ood"]) == 6
    assert task.notes() == [
        "the task task is without 1 of train (train has the same text), 1 of test (train has the same text), 1 of ood "
        "(train has the same text), 2 of train (the same text has two labels)"
    ]
    with pytest.raises(UserError, match=r"'a' has no test text.* it is without 2 of test \(train has the same text"):
        read_labelled(write_jsonl(tmp_path / "all.jsonl", [*rows_of(test=0), *known_by_heart()]))


def known_by_heart() -> list[dict]:
    return [{"text": f"train {label} number 0", "label": label, "split": "test"} for label in "ab"]


def test_random_labels_on_repeated_texts_leave_no_text_that_train_and_test_share(tmp_path):
    """A probe that knows its train texts by heart would score 1 on them."""
    generator = np.random.default_rng(0)
    rows = [
        {"text": f"text {i % 100}", "label": "ab"[generator.integers(2)] if i >= 100 else "ab"[i % 2], "split": part}
        for i, part in enumerate(["train"] * 130 + ["test"] * 90)
    ]
    rows += [{"text": f"new {i}", "label": "ab"[i % 2], "split": "test"} for i in range(4)]
    (task,) = read_labelled(write_jsonl(tmp_path / "task.jsonl", rows))
    assert len(task.texts["train"]) == len(set(task.texts["train"]))
    assert not set(task.texts["train"]) & set(task.texts["test"])


def jsonl(*lines: str) -> str:
    return "\n".join([*lines, *map(json.dumps, rows_of())])


REFUSED = {
    "no label": ("t.jsonl", jsonl('{"text": "x", "split": "train"}'), "line 1 has no label; every text needs"),
    "null text": ("t.jsonl", jsonl('{"text": null, "label": 1, "split": "test"}'), "line 1 has no text"),
    "text is a number": ("t.jsonl", jsonl('{"text": 5, "label": 1, "split": "test"}'), "line 1 has a text that is 5"),
    "blank text": ("t.jsonl", jsonl('{"text": " ", "label": 1, "split": "test"}'), "line 1 has a text without a word"),
    "label is a list": ("t.jsonl", jsonl('{"text": "x", "label": [1], "split": "test"}'), "line 1 has the label"),
    "half a pair": ("t.jsonl", jsonl('{"text": "\\ud800", "label": 1, "split": "test"}'), "line 1 has half of a surr"),
    "unknown split": ("t.jsonl", jsonl('{"text": "x", "label": 1, "split": "dev"}'), "line 1 has the split 'dev'; use"),
    "not JSON": ("t.jsonl", jsonl("text"), "line 1 is not JSON"),
    "no object": ("t.jsonl", jsonl("", "[1]"), "line 2 is not a JSON object"),
    "too deep": ("t.jsonl", jsonl("[" * 100_000), "line 1 is not JSON"),
    "no header": ("t.csv", "x,a,train\n", "has no column called text in its first line"),
    "short row": ("t.csv", "text,label,split\nx,a,train\nx,a\n", "line 3 has no split"),
    "open quotes": ("t.csv", 'text,label,split\n"x,a,train\n', "cannot be read"),
    "no train": ("t.csv", "text,label,split\nx,a,test\n", "holds no text with the split 'train'; a task needs"),
    "no test": ("t.csv", "text,label,split\nx,a,train\n", "holds no text with the split 'test'"),
    "empty": ("t.jsonl", "", "holds no text with the split 'train'"),
    "one class": ("t.csv", "text,label,split\nx,a,train\nx,a,test\n", r"holds one class only \('a'\)"),
    "few of each": ("t.csv", "text,label,split\nx,a,train\nx,b,test\n", "leaves fewer than two classes to tell apart"),
    "ending": ("t.tsv", "text\tlabel", "ends in '.tsv'; text is read from .jsonl or .csv files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_said_with_file_and_line(tmp_path, case):
    name, content, words = REFUSED[case]
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        read_labelled(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_text_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is nothing at"):
        read_labelled(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"holds no \.jsonl or \.csv file"):
        read_labelled(tmp_path)
    (tmp_path / "latin.csv").write_bytes("text,label,split\nx,a,train\nné,a,test".encode("latin-1"))
    with pytest.raises(UserError, match="line 3 is not UTF-8"):
        read_labelled(tmp_path / "latin.csv")
    monkeypatch.setattr(labelled_text, "MAX_FIELD", 1000)
    before = csv.field_size_limit()
    for write in (write_jsonl, write_csv):
        path = write(tmp_path / f"huge.{write.__name__[6:]}", [{"text": "x" * 1001, "label": "a", "split": "train"}])
        with pytest.raises(UserError, match=r"line [12] .*(1001 characters|larger than field limit)"):
            read_labelled(path)
        path.unlink()
    assert csv.field_size_limit() == before
    (tmp_path / "latin.csv").unlink()
    for write, name in ((write_jsonl, "same.jsonl"), (write_csv, "same.csv")):
        write(tmp_path / name, rows_of())
    with pytest.raises(UserError, match="holds 2 files called same"):
        read_labelled(tmp_path)


def test_plain_text_is_read_by_paragraph_line_or_row(tmp_path):
    (tmp_path / "one.txt").write_text("a first\nline\n \n\nand a second\r\n\r\nthird\n", encoding="utf-8")
    assert read_plain_text(tmp_path / "one.txt") == ["a first\nline", "and a second", "third"]
    write_jsonl(tmp_path / "two.jsonl", [{"text": "x"}, {"text": "y"}])
    (tmp_path / "three.csv").write_text('text\n"p, q"\n', encoding="utf-8")
    assert read_plain_text(tmp_path / "two.jsonl") == ["x", "y"]
    assert read_plain_text(tmp_path / "three.csv") == ["p, q"]
    whole = "a first\nline\n \n\nand a second\r\n\r\nthird"  # in a folder, a file is a document
    assert read_plain_text(tmp_path) == [whole, "p, q", "x", "y"]
    (tmp_path / "none.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="holds no text"):
        read_plain_text(tmp_path / "none.txt")
    write_jsonl(tmp_path / "two.jsonl", [{"words": "x"}])
    with pytest.raises(UserError, match="line 1 has no text"):
        read_plain_text(tmp_path / "two.jsonl")


def test_the_examples_of_the_page_are_read_and_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled_text, "MIN_TRAIN", 1)
    page = PAGE.read_text(encoding="utf-8")
    tasks = []
    for language, ending in (("json", "jsonl"), ("csv", "csv")):
        (example,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        (tmp_path / f"example.{ending}").write_text(example, encoding="utf-8")
        tasks += read_labelled(tmp_path / f"example.{ending}")
    first, second = tasks
    assert first.classes == second.classes == ("annoyed", "pleased")
    assert first.texts == second.texts
    assert {part: len(texts) for part, texts in first.texts.items()} == {"train": 2, "test": 2, "ood": 2}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("tiny")


def sentences(n: int, seed: int = 0) -> list[str]:
    """Texts of the embedded language, of 3 to 20 words."""
    generator = np.random.default_rng(seed)
    documents = embedded.documents(seed)
    return [" ".join(next(documents).split()[: generator.integers(3, 20)]) for _ in range(n)]


def test_each_row_is_the_last_token_of_its_text_run_alone(loaded, monkeypatch):
    monkeypatch.setattr(text_rows, "BATCH_TOKENS", 60)  # several batches
    texts = sentences(12)
    rows = last_token_rows(loaded, HOOK, texts, store=Store(None), purpose="test")
    assert rows.dtype == torch.float32
    for text, row in zip(texts, rows, strict=True):
        ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(text, add_special_tokens=False)]
        alone = activations(loaded, torch.tensor([ids]), [HOOK])[HOOK][0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_special_tokens_at_the_end_are_passed_over_and_of_a_long_text_the_end_is_read(loaded):
    text = sentences(1)[0]
    plain, ended = (
        last_token_rows(loaded, HOOK, [t], store=Store(None), purpose="test") for t in (text, f"{text} nonsenseword")
    )
    torch.testing.assert_close(plain, ended)  # an unknown word is a special token
    long = " ".join(next(embedded.documents(1)).split() * 2)
    assert loaded.max_tokens is not None
    kept = loaded.tokenizer.encode(long, add_special_tokens=False)[-(loaded.max_tokens - 1) :]
    (row,) = last_token_rows(loaded, HOOK, [long], store=Store(None), purpose="test")
    tokens = torch.tensor([[loaded.tokenizer.bos_token_id, *kept]])
    torch.testing.assert_close(row, activations(loaded, tokens, [HOOK])[HOOK][0, -1])
    with pytest.raises(UserError, match="the text 'nonsenseword' is no token to"):
        last_token_rows(loaded, HOOK, ["nonsenseword"], store=Store(None), purpose="test")


def test_the_model_runs_once_over_the_same_texts(loaded, tmp_path, monkeypatch):
    texts = sentences(5)
    first = last_token_rows(loaded, HOOK, texts, store=Store(tmp_path), purpose="test")
    with monkeypatch.context() as patch:
        patch.setattr(text_rows, "_last_rows", lambda *_: pytest.fail("the model ran again"))
        assert torch.equal(first, last_token_rows(loaded, HOOK, texts, store=Store(tmp_path), purpose="test"))
    other = last_token_rows(loaded, HOOK, texts[::-1], store=Store(tmp_path), purpose="test")
    torch.testing.assert_close(other, first.flip(0), rtol=1e-4, atol=1e-4)


def text_task(n_classes: int, n: int, ood: bool) -> TextTask:
    parts = ["train", "test", *(["ood"] if ood else [])]
    labels = {part: np.arange(n) % n_classes for part in parts}
    texts = {part: sentences(n, seed) for seed, part in enumerate(parts)}
    return TextTask(name="task", classes=tuple("abc"[:n_classes]), texts=texts, labels=labels, left_out={})


def test_a_task_of_texts_has_its_labels_on_its_rows(loaded, monkeypatch):
    task = text_task(3, 12, ood=True)
    (made,) = make_text_tasks(loaded, HOOK, [task], store=Store(None), seed=0)
    assert (made.name, made.classes, made.origin) == ("task", ("a", "b", "c"), "local")
    assert made.shifted is not None
    for part, rows in (("train", made.fit), ("test", made.test), ("ood", made.shifted)):
        assert (rows.labels.argmax(0) == task.labels[part]).all()
        expected = last_token_rows(loaded, HOOK, task.texts[part], store=Store(None), purpose="test")
        torch.testing.assert_close(rows.taken().x, expected, rtol=1e-4, atol=1e-4)
    (two,) = make_text_tasks(loaded, HOOK, [text_task(2, 10, ood=False)], store=Store(None), seed=0)
    assert two.classes == ("b",)
    assert two.shifted is None
    assert (two.fit.labels[0] == (np.arange(10) % 2 == 1)).all()
    monkeypatch.setattr(text_rows, "MAX_TEXTS", 6)
    thinned, again, other = (
        make_text_tasks(loaded, HOOK, [task], store=Store(None), seed=seed)[0] for seed in (0, 0, 1)
    )
    assert thinned.fit.labels.sum(1).tolist() == [2, 2, 2]
    assert torch.equal(thinned.fit.source.x, again.fit.source.x)
    assert not torch.equal(thinned.fit.source.x, other.fit.source.x)
