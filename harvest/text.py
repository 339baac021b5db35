"""Text: a stream of documents from the embedded language, local files or a hub data set."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_spec.errors import UserError
from harvest import embedded
from harvest.hub_name import PRESETS, HubName, hub_id, parse_hub_name
from harvest.local_text import KINDS_SAID, kind_of, local_documents, text_files

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents in a fixed order, and where they come from. `revision` is a hub commit, or empty."""

    id: str
    revision: str
    documents: Iterator[str]


def open_text(dataset: str, seed: int) -> Text:
    """Open `embedded`, a preset, a local file or folder, or a hub data set `owner/name[:config[:split]][#column]`.

    A preset and a hub data set may end in `@revision`. `seed` chooses the text of the embedded language only. The name
    of a preset means the preset; `./pile` is a folder. Raises UserError for text that is not there or not readable,
    some of it only while the documents are read.
    """
    name = check_dataset(dataset)
    if dataset == EMBEDDED:
        return Text(id=EMBEDDED, revision="", documents=embedded.documents(seed))
    if name is None:
        return Text(id=text_id(dataset), revision="", documents=local_documents(Path(dataset)))
    # `datasets` takes most of a second to import, and no other source needs it.
    from harvest.hub_text import open_hub_text

    revision, documents = open_hub_text(name, dataset.partition("@")[2])
    return Text(id=text_id(dataset), revision=revision, documents=documents)


def check_dataset(dataset: str) -> HubName | None:
    """Which hub data set it names, None for a text that is here. Looks at no hub and reads nothing.

    Raises UserError for a text that is neither.
    """
    path = Path(dataset)
    if dataset == EMBEDDED or (not _is_preset(dataset) and path.exists()):
        return None
    name = parse_hub_name(dataset)
    if name is None or kind_of(path):
        raise UserError(
            f"there is no text at {dataset}; give {KINDS_SAID}, a folder of them, a hub data set (owner/name), "
            f"a preset ({', '.join(PRESETS)}) or {EMBEDDED}"
        )
    return name


def text_id(dataset: str) -> str:
    """The name a plan gives to a text: `embedded`, a file's or folder's name, a hub data set without its revision, or
    a preset with the id of its data set. Needs the text not to be there any more."""
    path = Path(dataset)
    if dataset == EMBEDDED:
        return EMBEDDED
    if _is_preset(dataset) or (parse_hub_name(dataset) and not path.exists() and not kind_of(path)):
        return hub_id(dataset)
    return path.resolve().name


def text_facts(dataset: str) -> dict[str, int | str]:
    """Size and SHA-256 of a local text, for the plan; of a folder, the SHA-256 of what `sha256sum` says of its files.

    Empty for the embedded language, for a hub data set (its revision says the same), and for a text that is not there.
    """
    path, facts = Path(dataset), text_bytes(dataset)
    if not facts:
        return {}
    if path.is_file():
        return {**facts, "text_sha256": _sha256(path)}
    lines = [f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in text_files(path)]
    return {**facts, "text_sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}


def text_bytes(dataset: str) -> dict[str, int]:
    """The size alone, without reading it; empty where `text_facts` is."""
    path = Path(dataset)
    if dataset == EMBEDDED or _is_preset(dataset) or not path.exists():
        return {}
    return {"text_bytes": sum(file.stat().st_size for file in ([path] if path.is_file() else text_files(path)))}


def _is_preset(dataset: str) -> bool:
    return dataset.partition("@")[0] in PRESETS


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
