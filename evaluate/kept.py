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
from cache_spec.untrusted import json_of, read_bounded
from train.pushing import MOST_REPORT

ROOT = Path(__file__).parent.parent
ALL = ("cache_spec", "harvest", "train", "evaluate")
LIBRARIES = ("numpy", "scipy", "tokenizers", "torch", "transformers")
MEASURED = ("threshold", "n_rows", "l0", "metrics", "profiles", "example", "eval_result_metrics", "missing")
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
    """What was measured, by a report with this fingerprint that was not changed, else None: the case is measured again.

    So it is if the report, whose checksum anybody can make, does not say what a report says.
    """
    try:
        report = check_seal(json_of(read_bounded(path, MOST_REPORT)), path)
    except (OSError, ValueError):
        return None
    measured = {name: report[name] for name in MEASURED if name in report}
    return measured if report.get("fingerprint") == wanted and _is_measurement(measured) else None


def _is_measurement(found: Mapping[str, Any]) -> bool:
    if len(found) < len(MEASURED):
        return False
    metrics, profiles, example = found["metrics"], found["profiles"], found["example"]
    return (
        _is_number(found["l0"])
        and isinstance(metrics, dict)
        and all(isinstance(numbers, dict) and all(map(_is_number, numbers.values())) for numbers in metrics.values())
        and isinstance(profiles, dict)
        and all(isinstance(profile, list) and all(map(_is_number, profile)) for profile in profiles.values())
        and (example is None or _is_example(example))
    )


def _is_example(found: Any) -> bool:
    return (
        _has_fields(found, {"family": str, "parent": str, "latents": list, "bars": list})
        and all(type(latent) is int for latent in found["latents"])
        and all(
            _has_fields(bar, {"child": str, "n": int, "firing": float, "absorbed": float, "absorber": str})
            and 0 <= bar["firing"] <= 1
            and 0 <= bar["absorbed"] <= 1
            for bar in found["bars"]
        )
    )


def _has_fields(found: Any, kinds: Mapping[str, type]) -> bool:
    """Whether something is an object of these fields and no others, each of its kind."""
    return (
        isinstance(found, dict)
        and found.keys() == kinds.keys()
        and all(isinstance(found[name], kind) for name, kind in kinds.items())
    )


def _is_number(value: object) -> bool:
    """Whether it is a number as we write one, or null."""
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


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
