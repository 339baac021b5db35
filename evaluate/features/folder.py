"""A folder of many files that is whole or not there: made beside its place, and renamed when all is written."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_spec.errors import UserError
from cache_spec.files import PARTIAL, disk_full_as_error, readable_json
from cache_spec.untrusted import json_of, read_bounded

MARK = "granary.json"  # in the folder: what made it, and from what


def check_place(out: Path, made_by: str) -> None:
    """Raises UserError if `out` is a file, or holds what this command did not write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()) and facts_of(out).get("made_by") != made_by:
        raise UserError(f"--out {out} holds something else than this command writes; name a new or empty folder")


def facts_of(out: Path) -> dict[str, Any]:
    """What the folder says of itself; nothing if it is not one of ours."""
    try:
        facts = json_of(read_bounded(out / MARK))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@contextmanager
def whole_folder(out: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `out` when the block ends well; else nothing changes.

    facts: go into MARK, with "made_by" to know the folder again by. What `out` held before is deleted.
    """
    check_place(out, facts["made_by"])
    place = out.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.parent / f".{place.name}.{uuid.uuid4().hex}{PARTIAL}"
    old = new.with_name(f"{new.name}.old")
    new.mkdir()
    try:
        with disk_full_as_error(new, 0):
            yield new
            (new / MARK).write_bytes(readable_json(facts))
        if place.exists():
            place.rename(old)
        new.rename(place)
    finally:
        if old.exists() and not place.exists():  # between the two renames
            old.rename(place)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
