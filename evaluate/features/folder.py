"""A folder of many files that is whole or not there: made beside its place, and renamed when all is written."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cache_spec.errors import UserError
from cache_spec.files import disk_full_as_error, partial_folder, readable_json, write_file
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
    with disk_full_as_error(place.parent, 0), partial_folder(place) as new:
        yield new
        write_file(new / MARK, readable_json(facts))
        with ExitStack() as undo:
            if place.exists():
                old = new.with_name("old")  # goes with the temporary folder
                place.rename(old)
                undo.callback(old.rename, place)  # between the two renames
            new.rename(place)
            undo.pop_all()
