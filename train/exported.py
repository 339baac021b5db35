"""What a format makes of an SAE, and the folder it is written to: whole or not there."""

import errno
from dataclasses import dataclass
from pathlib import Path

from cache_spec.errors import UserError
from cache_spec.files import disk_full_as_error, partial_folder, remove_stale_partials_of, sync_folder, write_file


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Files by name, for a `subfolder` of the given one if it is named. kind: what the tool calls such an SAE.

    notes: how what the tool computes differs, and what else a user has to know, as sentences.
    """

    files: dict[str, bytes]
    kind: str
    subfolder: str = ""
    notes: tuple[str, ...] = ()


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a new folder in one step. Raises UserError if something is there."""
    remove_stale_partials_of(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name a new or empty folder with --out")
    if above := next((place for place in folder.absolute().parents if place.exists() and not place.is_dir()), None):
        raise UserError(f"{folder} lies under {above}, which is a file; name another folder with --out")
    folder = folder.resolve()  # `.` and `a/..` are no names to give a folder
    with disk_full_as_error(folder.parent, sum(map(len, files.values()))), partial_folder(folder) as partial:
        for name, data in files.items():
            write_file(partial / name, data)
        try:
            partial.replace(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # another process was faster
            raise UserError(f"{folder} is there already; name a new or empty folder with --out") from None
        sync_folder(folder.parent)
