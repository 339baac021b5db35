"""Text: a stream of documents from the embedded language, local files or a hub data set.

What is a document: one line of a `.jsonl` (its `text` field); a stretch between blank lines of a single `.txt`; a
whole `.txt` when a folder of them is given.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_spec.errors import UserError
from harvest import embedded

EMBEDDED = "embedded"
_SUFFIXES = (".txt", ".jsonl")
_HUB_ID = re.compile(r"[^/\s]+/[^/\s]+")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents in a fixed order, and where they come from. `revision` is a hub commit, or empty."""

    id: str
    revision: str
    documents: Iterator[str]


def open_text(dataset: str, seed: int) -> Text:
    """Open `embedded`, a .txt, a .jsonl, a folder of them, or a hub data set `owner/name[:config][@revision]`.

    `seed` chooses the text of the embedded language only. Raises UserError for text that is not there or not readable,
    some of it only while the documents are read.
    """
    if dataset == EMBEDDED:
        return Text(id=EMBEDDED, revision="", documents=embedded.documents(seed))
    path = Path(dataset)
    if path.is_dir():
        return Text(id=text_id(dataset), revision="", documents=_folder_documents(path))
    if path.is_file():
        documents = _jsonl_documents(path) if _kind(path) == ".jsonl" else _paragraphs(path)
        return Text(id=text_id(dataset), revision="", documents=documents)
    if path.suffix in _SUFFIXES or not _HUB_ID.fullmatch(dataset):
        raise UserError(
            f"there is no text at {dataset}; give a .txt, a .jsonl, a folder of them, "
            f"a hub data set (owner/name) or {EMBEDDED}"
        )
    # `datasets` takes most of a second to import, and no other source needs it.
    from harvest.hub_text import open_hub_text

    revision, documents = open_hub_text(dataset)
    return Text(id=text_id(dataset), revision=revision, documents=documents)


def text_id(dataset: str) -> str:
    """The name a plan gives to a text: `embedded`, a file's or folder's name, or a hub data set without its revision.

    Needs the text not to be there any more.
    """
    path = Path(dataset)
    if dataset != EMBEDDED and _HUB_ID.fullmatch(dataset) and not path.exists() and path.suffix not in _SUFFIXES:
        return dataset.partition("@")[0]
    return path.resolve().name


def text_facts(dataset: str) -> dict[str, int | str]:
    """Size and SHA-256 of a local text, for the plan; of a folder, the SHA-256 of what `sha256sum` says of its files.

    Empty for the embedded language, for a hub data set (its revision says the same), and for a text that is not there.
    """
    path = Path(dataset)
    if dataset == EMBEDDED or not path.exists():
        return {}
    if path.is_file():
        return {"text_bytes": path.stat().st_size, "text_sha256": _sha256(path)}
    files = _files_of(path)
    lines = [f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return {
        "text_bytes": sum(file.stat().st_size for file in files),
        "text_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} is neither .txt nor .jsonl; rename it, or convert it to one document a line of .jsonl")
    return path.suffix


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)


def _folder_documents(folder: Path) -> Iterator[str]:
    files = _files_of(folder)
    if not files:
        raise UserError(f"the folder {folder} holds no .txt and no .jsonl; give one that does")
    for path in files:
        if path.suffix == ".jsonl":
            yield from _jsonl_documents(path)
        else:
            yield _read(path)


def _paragraphs(path: Path) -> Iterator[str]:
    yield from filter(None, _BLANK_LINES.split(_read(path).strip()))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error


def _jsonl_documents(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"line {number} of {path} is no JSON object with a field 'text'") from error
            if not isinstance(text, str):
                raise UserError(f"line {number} of {path} has a 'text' that is {type(text).__name__}, not a string")
            yield text
