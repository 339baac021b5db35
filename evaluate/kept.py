"""Kept measurements: the report of a case is taken again if nothing that decides its numbers has changed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cache_spec.files import canonical_json, readable_json, write_file

ROOT = Path(__file__).parent.parent
_CODE = (  # what the numbers are computed with, beside libraries
    "evaluate",
    "harvest/embedded",
    "train/sae.py",
    "train/saelens.py",
    "train/activations.py",
    "train/calibration.py",
)


@cache
def code_hash() -> str:
    """SHA-256 of the source that measures."""
    found = hashlib.sha256()
    for place in _CODE:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def fingerprint(facts: Mapping[str, Any], *, device: str, metrics: Sequence[str], seed: int) -> str:
    """SHA-256 of everything that decides the numbers of a case.

    Beside the facts of case and bench: which metrics, the seed, the code, and torch's version, device and threads,
    which round differently.
    """
    whole = {
        "facts": facts,
        "metrics": list(metrics),
        "seed": seed,
        "code": code_hash(),
        "torch": torch.__version__,
        "device": torch.device(device).type,
        "n_threads": torch.get_num_threads(),
    }
    return hashlib.sha256(canonical_json(whole)).hexdigest()


def read_kept(path: Path, wanted: str) -> dict[str, Any] | None:
    """The report in a file if it has this fingerprint, else None: the case is measured, and the file replaced."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("fingerprint") == wanted else None


def keep(path: Path, report: Mapping[str, Any]) -> str:
    """Write a report in one step, unless the file is the same. Returns why it could not be written, or nothing.

    Raises DiskFull.
    """
    data = readable_json(report)
    try:
        if path.is_file() and path.read_bytes() == data:
            return ""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError as error:
        return str(error.strerror)
    return ""
