"""Where copies of remote caches go, and how large they may be together."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from cache_spec.counts import parse_bytes
from cache_spec.errors import UserError
from cache_spec.store import Patience
from cache_spec.store_url import is_url

DEFAULT_BYTES = "50GB"


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The folder of the copies, the bytes they may take together, and how long their stores are waited for."""

    folder: Path
    n_bytes: int
    patience: Patience = field(default_factory=Patience)


def copies_for(place: str | Path | None, folder: str | None, n_bytes: str) -> Copies:
    """What --cache-dir and --cache-bytes ask for. Raises UserError if they are given for a cache in a folder, or if
    the former names none: "" would be the folder that the command is run in.
    """
    if place is not None and not is_url(str(place)) and (folder is not None or n_bytes):
        option = "--cache-dir" if folder is not None else "--cache-bytes"
        raise UserError(f"{option} is for copies of a cache at a URL, and {place} is a folder; leave it out")
    if folder is not None and (not folder or is_url(folder)):
        raise UserError(f"--cache-dir is {folder!r:.200}; give a folder on this machine, or leave it out")
    return Copies(
        folder=default_folder() if folder is None else Path(os.path.expanduser(folder)),
        n_bytes=parse_bytes(n_bytes or DEFAULT_BYTES, "--cache-bytes"),
    )


def default_folder() -> Path:
    """Of granary, among the user's caches."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given.startswith("/") else Path("~/.cache")) / "granary" / "caches"
