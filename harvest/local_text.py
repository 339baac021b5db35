"""Documents of local files: .txt, .jsonl and .parquet, the first two also compressed, or a folder of them.

What is a document: a row of a `.parquet` or a line of a `.jsonl` (its `text`); a stretch between blank lines of a
single `.txt`; a whole `.txt` of a folder.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cache_spec.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet")
KINDS_SAID = "a .txt, .jsonl or .parquet (the first two also .gz or .zst)"
_PACKED = (".gz", ".zst")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ROWS_AT_ONCE = 256  # of a parquet, made into strings


def kind_of(path: Path) -> str:
    """The suffix that says how the file is read, without that of a compression; empty for any other file."""
    kind = path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix
    return kind if kind in KINDS and not (kind == ".parquet" and path.suffix in _PACKED) else ""


def text_files(folder: Path) -> list[Path]:
    """Every text in a folder and below it, by the names of its folders and its own."""
    files = (path for path in folder.rglob("*") if kind_of(path) and path.is_file())
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def local_documents(path: Path) -> Iterator[str]:
    """The documents of a file or folder. Raises UserError, once they are read, for one that is damaged or no text."""
    if not path.is_dir():
        return _file_documents(path, whole_txt=False)
    return _folder_documents(path)


def _folder_documents(folder: Path) -> Iterator[str]:
    files = text_files(folder)
    if not files:
        raise UserError(f"the folder {folder} holds no text; give one that holds {KINDS_SAID}")
    for path in files:
        yield from _file_documents(path, whole_txt=True)


def _file_documents(path: Path, whole_txt: bool) -> Iterator[str]:
    match kind_of(path):
        case ".jsonl":
            return _jsonl_documents(path)
        case ".parquet":
            return _parquet_documents(path)
        case ".txt":
            return _txt_documents(path, whole_txt)
    raise UserError(f"{path} is not {KINDS_SAID}; rename it, or convert it to one document a line of .jsonl")


def _txt_documents(path: Path, whole: bool) -> Iterator[str]:
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        if whole:
            yield lines.read()
        else:
            yield from paragraphs(lines)


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Lines with their ends -> the stretches between blank ones, without the whitespace before each and at the end."""
    block: list[str] = []
    is_over = False
    for line in lines:
        if line.isspace():
            is_over = bool(block)
            continue
        if is_over:
            yield "".join(block).lstrip().removesuffix("\n")
            block, is_over = [], False
        block.append(line)
    if block:
        yield "".join(block).strip()


def _jsonl_documents(path: Path) -> Iterator[str]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(line, f"line {number:,} of {path}")


def _text_of(line: bytes, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text; convert the file") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object with a field 'text'") from error
    return checked_text(text, where, "text")


def checked_text(value: Any, where: str, column: str) -> str:
    """The value, if it is a string of characters. Raises UserError that says where it stood."""
    if isinstance(value, str):
        if not _LONE_SURROGATE.search(value):
            return value
        found = "no text: it holds half of a surrogate pair (such as \\ud800), which is no character"
    else:
        found = "empty (null)" if value is None else f"{type(value).__name__}, not a string"
    raise UserError(f"{where} has a '{column}' that is {found}; leave such rows out of the text")


def _parquet_documents(path: Path) -> Iterator[str]:
    import pyarrow.parquet  # here, for it takes a while, and no other text needs it

    number = 0
    with _damage_as_error(path), pyarrow.parquet.ParquetFile(path) as file:
        _check_column(file.schema_arrow, path)
        for group in range(file.num_row_groups):  # one at a time, so that only one is ever in memory
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=["text"]):
                for value in batch.column(0):
                    number += 1
                    yield checked_text(value.as_py(), f"row {number:,} of {path}", "text")


def _check_column(schema: Any, path: Path) -> None:
    import pyarrow

    if "text" not in schema.names:
        raise UserError(f"{path} has no column 'text', only {', '.join(schema.names) or 'none'}; rename one")
    kind = schema.field("text").type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view
    if not any(test(values) for test in is_text):
        raise UserError(f"the column 'text' of {path} holds {kind}, not strings; convert it")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes as they were before it was compressed. Damage met while it is read becomes a UserError."""
    with _damage_as_error(path):
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                yield file  # pyright: ignore[reportReturnType]
        elif path.suffix == ".zst":
            import pyarrow  # the one library at hand that reads Zstandard in a stream

            with pyarrow.input_stream(path, compression="zstd") as stream, io.BufferedReader(stream) as file:
                yield file  # pyright: ignore[reportReturnType]
        else:
            with path.open("rb") as file:
                yield file


@contextmanager
def _damage_as_error(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#x}); convert it") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read, it may be damaged: {reason}") from error
