"""Kept measurements: the report of a case is taken again if nothing that decides its numbers has changed."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cache_spec.files import (
    canonical_json,
    check_seal,
    readable_json,
    remove_stale_partials_of,
    seal,
    write_file,
)
from cache_spec.untrusted import json_of

ROOT = Path(__file__).parent.parent
ALL = ("cache_spec", "harvest", "train", "evaluate")
LIBRARIES = ("numpy", "scipy", "tokenizers", "torch", "transformers")
_SHOWN = {  # of evaluate: what compares and shows numbers that are there
    f"evaluate/{name}.py"
    for name in (
        *("__main__", "command", "compare", "compared", "curves", "figures", "frontier", "guards", "histograms"),
        *("page", "scale", "series", "statistics", "verdicts", "wording"),
    )
}


@cache
def code_hash(packages: Sequence[str] = ALL) -> str:
    """SHA-256 of the source in packages that decides numbers."""
    found = hashlib.sha256()
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if name not in _SHOWN:
                found.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def fingerprint(facts: Mapping[str, Any], *, device: str, metrics: Sequence[str], seed: int) -> str:
    """SHA-256 of everything that decides the numbers of a case.

    Beside the facts of case and bench: which metrics, the seed, the code, and libraries, device and threads, which
    round differently.
    """
    whole = {
        "facts": facts,
        "metrics": list(metrics),
        "seed": seed,
        "code": code_hash(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "device": torch.device(device).type,
        "n_threads": torch.get_num_threads(),
    }
    return hashlib.sha256(canonical_json(whole)).hexdigest()


def read_kept(path: Path, wanted: str) -> dict[str, Any] | None:
    """The report in a file if it has this fingerprint and was not changed, else None: the case is measured again."""
    try:
        report = check_seal(json_of(path.read_bytes()), path)
    except (OSError, ValueError):
        return None
    return report if report.get("fingerprint") == wanted else None


def keep(path: Path, report: Mapping[str, Any]) -> str:
    """Write a report and its checksum in one step, unless the file is the same. Returns why it could not, or nothing.

    Raises DiskFull.
    """
    data = readable_json(seal(dict(report)))
    try:
        if path.is_file() and path.read_bytes() == data:
            return ""
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_partials_of(path)
        write_file(path, data)
    except OSError as error:
        return str(error.strerror)
    return ""
