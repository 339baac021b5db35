"""Labelled text of the user's own, and plain text of another distribution; docs/probing.md shows the layout."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.errors import UserError

PARTS = ("train", "test", "ood")
KINDS = (".jsonl", ".csv")
MIN_TRAIN = 20  # texts of a class: fewer do not fit a probe
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_FIELD = 2**20  # characters; a longer one is most likely a quotation mark that is never closed


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTask:
    """One task: texts with a class each, in two or three parts.

    texts: "train", "test" and, if there are any, "ood" -> texts. labels: part -> [n] numbers of `classes`. left_out:
    classes that are not probed, and why. origin: as in ProbeData. copies: what copies are -> how many are left out.
    """

    name: str
    classes: tuple[str, ...]
    texts: Mapping[str, list[str]]
    labels: Mapping[str, np.ndarray]
    left_out: Mapping[str, str]
    origin: str = "local"
    copies: Mapping[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """A sentence for each class that is not probed, and one on the texts that are left out."""
        classes = [
            f"the class '{label}' of the task {self.name} is left out: it {why}" for label, why in self.left_out.items()
        ]
        return classes + ([f"the task {self.name} is {_without(self.copies)}"] if self.copies else [])


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text with its class and part."""

    text: str
    label: str
    part: str


def read_labelled(path: Path) -> list[TextTask]:
    """The tasks of a file, or of a folder of files, one each: `.jsonl` or `.csv` with text, label and split.

    Raises UserError, with file and line, for what cannot be used. Classes with fewer than 20 train texts or no test
    text are left out.
    """
    files = _files(path)
    for name, n in Counter(file.stem for file in files).items():
        if n > 1:
            raise UserError(f"the folder {path} holds {n} files called {name}; a file names its task, so rename one")
    return [task_of(file.stem, _examples(file), str(file)) for file in files]


def read_plain_text(path: Path) -> list[str]:
    """The documents of a `.txt`, or the texts of a `.jsonl` or `.csv`; or of a folder of them.

    As in a harvest, a single `.txt` holds documents with blank lines between them, and one in a folder is a document.
    Raises UserError, with file and line, for what cannot be used, and where there is no text at all.
    """
    texts = [text for file in _files(path, (".txt", *KINDS)) for text in _plain_texts(file, whole=path.is_dir())]
    if not texts:
        raise UserError(f"{path} holds no text; give one with words in it")
    return texts


def task_of(name: str, examples: list[Example], where: str, origin: str = "local") -> TextTask:
    """Put examples in parts and number their classes, in the order of their names.

    `where` is named in errors: no train or test texts, or fewer than two classes that can be probed.
    """
    for part in ("train", "test"):
        if all(example.part != part for example in examples):
            raise UserError(
                f"{where} holds no text with the split '{part}'; a task needs train and test, and may have ood"
            )
    all_labels = {example.label for example in examples}
    examples, copies = _distinct(examples)
    counts = {part: Counter(example.label for example in examples if example.part == part) for part in PARTS}
    labels = sorted(all_labels, key=_numbers_first)
    if len(labels) == 1:
        raise UserError(f"{where} holds one class only ('{labels[0]}'); a probe tells two or more apart")
    left_out = {label: why for label in labels if (why := _unusable(counts, label))}
    classes = [label for label in labels if label not in left_out]
    if len(classes) < 2:
        reasons = "; ".join(f"'{label}' {why}" for label, why in left_out.items())
        reasons += f"; it is {_without(copies)}" if copies else ""
        raise UserError(f"{where} leaves fewer than two classes to tell apart ({reasons}); give more texts of them")
    number = {label: i for i, label in enumerate(classes)}
    kept = {part: [e for e in examples if e.part == part and e.label in number] for part in PARTS}
    return TextTask(
        name=name,
        classes=tuple(classes),
        texts={part: [example.text for example in found] for part, found in kept.items() if found},
        labels={
            part: np.array([number[e.label] for e in found], dtype=np.int64) for part, found in kept.items() if found
        },
        left_out=left_out,
        origin=origin,
        copies=copies,
    )


def _distinct(examples: list[Example]) -> tuple[list[Example], dict[str, int]]:
    """Examples without those that a probe could know by heart, and how many of each sort are left out."""
    trained: dict[str, set[str]] = {}
    for example in examples:
        if example.part == "train":
            trained.setdefault(example.text, set()).add(example.label)
    disputed = {text for text, labels in trained.items() if len(labels) > 1}
    kept, copies, seen = [], Counter(), set()
    for example in examples:
        is_train = example.part == "train"
        if is_train and example.text in disputed:
            copies["train (the same text has two labels)"] += 1
        elif example.text in (seen if is_train else trained) and example.text not in disputed:
            copies[f"{example.part} (train has the same text)"] += 1
        else:
            kept.append(example)
        if is_train:
            seen.add(example.text)
    return kept, dict(copies)


def _without(copies: Mapping[str, int]) -> str:
    return "without " + ", ".join(f"{n} of {which}" for which, n in copies.items())


def _unusable(counts: Mapping[str, Counter], label: str) -> str:
    n_train = counts["train"][label]
    if n_train < MIN_TRAIN:
        return f"has {n_train} train text{'s' * (n_train != 1)}, and {MIN_TRAIN} are wanted"
    if not counts["test"][label]:
        return "has no test text"
    return "has no ood text" if counts["ood"] and not counts["ood"][label] else ""


def _numbers_first(label: str) -> tuple[bool, float, str]:
    return (False, float(label), label) if label.isdecimal() else (True, 0.0, label)


def _files(path: Path, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    said = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
        if not files:
            raise UserError(f"the folder {path} holds no {said} file; put one a task into it")
        return files
    if not path.is_file():
        raise UserError(f"there is nothing at {path}; give a {said} file, or a folder of them")
    if path.suffix not in kinds:
        raise UserError(f"{path} ends in '{path.suffix}'; text is read from {said} files, so convert or rename it")
    return [path]


def _examples(path: Path) -> list[Example]:
    examples = []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        missing = [name for name in ("text", "label", "split") if row.get(name) in (None, "")]
        if missing:
            raise UserError(f"{where} has no {' and no '.join(missing)}; every text needs text, label and split")
        if row["split"] not in PARTS:
            raise UserError(f"{where} has the split {row['split']!r}; use train, test or ood")
        examples.append(Example(text=_text(row["text"], where), label=_label(row["label"], where), part=row["split"]))
    return examples


def _plain_texts(path: Path, whole: bool) -> Iterator[str]:
    if path.suffix == ".txt":
        content = _content(path)
        documents = [content] if whole else re.split(r"\n\s*\n", content.replace("\r\n", "\n"))
        yield from (document.strip() for document in documents if document.strip())
        return
    for line, row in _rows(path):
        if row.get("text") in (None, ""):
            raise UserError(f"{path}, line {line} has no text; every line needs a field of that name")
        yield _text(row["text"], f"{path}, line {line}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} has a text that is {json.dumps(value)[:40]}, not a string; put it in quotation marks")
    if not value.strip():
        raise UserError(f"{where} has a text without a word; leave the line out")
    if _LONE_SURROGATE.search(value):
        raise UserError(f"{where} has half of a surrogate pair (such as \\ud800), which is no character; leave it out")
    if len(value) > MAX_FIELD:
        raise UserError(
            f"{where} has a text of {len(value)} characters, and {MAX_FIELD} is the most; cut it, or close the "
            "quotation mark that lets it run on"
        )
    return value


def _label(value: Any, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} has the label {json.dumps(value)[:40]}; a label is a string or a number")
    return str(value)


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line number, counted from 1, and fields of every row."""
    content = _content(path)
    return csv_rows(str(path), content, "text") if path.suffix == ".csv" else list(_jsonl_rows(path, content))


def _jsonl_rows(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line} is not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, line {line} is not a JSON object; write {{"text": ..., "label": ..., "split": ...}}'
            )
        yield line, row


def csv_rows(where: str, content: str, column: str) -> list[tuple[int, dict[str, Any]]]:
    """The line that each row starts on, and its fields by the names in the first line, of which `column` is one.

    Raises UserError for quotation marks that do not fit, a field of more than MAX_FIELD characters, and a missing
    column.
    """
    before = csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    rows = []
    try:
        if column not in (reader.fieldnames or ()):
            raise UserError(f"{where} has no column called {column} in its first line; name the columns there")
        start = reader.line_num + 1
        for row in reader:
            rows.append((start, row))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{where}, line {reader.line_num} cannot be read ({error}); close its quotation marks, and double those "
            "inside a text"
        ) from error
    finally:
        csv.field_size_limit(before)
    return rows


def _content(path: Path) -> str:
    """The whole file, without a byte order mark. Raises UserError if it is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line} is not UTF-8; save it in that encoding") from error
