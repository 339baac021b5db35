"""Finished runs to the hub in SAELens's layout: <repo>/<sae_id>/cfg.json, sae_weights.safetensors, and a card.

All files go in one commit, so a repository holds all of them or none. What names a place on this machine stays here.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_spec.errors import CacheConflict, UserError
from cache_spec.files import crc32c, readable_json, seal
from cache_spec.hub import (
    ATTRIBUTES,
    README,
    Remote,
    Repository,
    check_login,
    check_visibility,
    commit,
    fetch,
    look,
    make,
)
from cache_spec.untrusted import json_of, read_bounded
from train.known import check_facts, check_report
from train.run_folder import CFG, FACTS, LOG, STATE, WEIGHTS, holds_files, load_run, without_seal

REPORT, PAGE = "report.json", "report.html"  # evaluate writes both for one run as for many
MOST_REPORT = 2**30  # bytes of one; that over all runs has every number of each
_OF_A_RUN = {CFG, WEIGHTS, FACTS, LOG, REPORT, PAGE, STATE}
_OF_RUNS = {REPORT, PAGE}
SAE_ID = re.compile(r"[A-Za-z0-9][\w.=+,-]*")
# a path from the root or the home of a machine, two names or more; `a/b` and `https://a/b` are none
_PATH = re.compile(r"(?<![\w.:/@~-])(?:~|\.{1,2})?/(?:[\w.+=@-]+/)+([\w.+=@-]+)/?")


@dataclass(frozen=True, kw_only=True)
class PushedRun:
    """One SAE as it goes to the hub: its folder there, and its facts without paths of this machine."""

    sae_id: str
    config: dict[str, Any]  # cfg.json
    facts: dict[str, Any]  # run.json
    report: dict[str, Any] | None  # report.json, if evaluate has been there
    weights: Path

    @property
    def files(self) -> dict[str, Path | bytes]:
        """Every file by its name in the repository."""
        config = readable_json(self.config)
        changed = {CFG: {"bytes": len(config), "crc32c": f"{crc32c(config):08x}"}}
        sums = {"files": self.facts["files"] | changed} if "files" in self.facts else {}
        report = {} if self.report is None else {REPORT: readable_json(without_seal(self.report))}
        inside = {CFG: config, FACTS: readable_json(seal({**self.facts, **sums})), WEIGHTS: self.weights, **report}
        return {f"{self.sae_id}/{name}": data for name, data in inside.items()}


def read_runs(runs: Path) -> list[PushedRun]:
    """The runs of a folder, or the one that the folder is. Raises UserError for unfinished runs and foreign files."""
    if not runs.is_dir():
        raise UserError(f"there is no folder {runs}; give the folder that `python -m train` wrote with --out")
    if (runs / FACTS).exists():
        return [_read_run(runs.resolve())]
    folders = []
    for entry in sorted(runs.iterdir()):
        if (entry / FACTS).exists():
            folders.append(entry)
        elif not (entry.name.startswith(".") or entry.name in _OF_RUNS or (entry.is_dir() and not holds_files(entry))):
            raise UserError(f"{runs} holds {entry.name}, which is no run; move it away, so that only runs are pushed")
    if not folders:
        raise UserError(f"{runs} holds no run (a folder with {FACTS}); give the --out of `python -m train`")
    return [_read_run(folder) for folder in folders]


def _read_run(folder: Path) -> PushedRun:
    if not SAE_ID.fullmatch(folder.name):
        raise UserError(f"'{folder.name}' can be no name of an SAE on the hub; rename the folder: letters, digits, ._-")
    run = load_run(folder)
    foreign = sorted(e.name for e in folder.iterdir() if e.name not in _OF_A_RUN and not e.name.startswith("."))
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which is no file of a run; move it away, then push again")
    check_facts(run.facts, folder / FACTS)
    report = _read(folder / REPORT) if (folder / REPORT).exists() else None
    if report is not None:
        check_report(report, folder / REPORT)
    cache = str(run.facts["cache"].get("path", ""))
    return PushedRun(
        sae_id=folder.name,
        config=without_paths(_read(folder / CFG), cache),
        facts=without_paths(run.facts, cache),
        report=None if report is None else without_paths(report, cache),
        weights=folder / WEIGHTS,
    )


def read_report(runs: Path) -> dict[str, Any] | None:
    """The report over all runs without paths, if there is one beside them."""
    single = (runs / FACTS).exists()
    return None if single or not (runs / REPORT).exists() else without_paths(_read(runs / REPORT))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json_of(read_bounded(path, MOST_REPORT), finite=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); make it again, or move it away") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; make it again, or move it away")
    return found


def without_paths(value: Any, known: str = "") -> Any:
    """The same JSON, with each path of this machine cut down to its last name; `known` is one that may hold spaces."""
    if isinstance(value, Mapping):
        return {without_paths(key, known): without_paths(inside, known) for key, inside in value.items()}
    if isinstance(value, list):
        return [without_paths(inside, known) for inside in value]
    if not isinstance(value, str):
        return value
    text = value.replace(known, Path(known).name) if "/" in known else value
    if text.startswith(("/", "~/")) and text.count("/") > 1 and "\n" not in text and Path(text).name:
        return Path(text).name
    return _PATH.sub(r"\1", text)


def files_to_push(runs: Sequence[PushedRun], report: dict[str, Any] | None, card: str) -> dict[str, Path | bytes]:
    """Every file of the repository."""
    files: dict[str, Path | bytes] = {README: card.encode()}
    files |= {} if report is None else {REPORT: readable_json(report)}
    for run in runs:
        files |= run.files
    return files


def push_files(files: Mapping[str, Path | bytes], repository: Repository, *, private: bool) -> None:
    """Commit them. Raises CacheConflict if the repository holds something else, UserError and HubError."""
    check_login()
    found = look(repository)
    if found is None:
        make(repository, private=private)
    else:
        check_visibility(repository, found, private=private)
        _refuse_other(files, repository, found)
    n_saes = sum(name.endswith(f"/{CFG}") for name in files)
    commit(repository, files, f"{n_saes} sparse autoencoder{'s' if n_saes > 1 else ''} of granary")


def _refuse_other(files: Mapping[str, Path | bytes], repository: Repository, found: Remote) -> None:
    """A repository may be new, or one that `push` made of these runs."""
    there = set(found.files) - {ATTRIBUTES}
    if foreign := sorted(there - set(files)):
        raise CacheConflict(
            f"'{repository.name}' is there and holds '{foreign[0]}', which is not in these runs; push all runs of a "
            "repository together, or give another --repo"
        )
    if there and not (README in there and _is_our_card(repository, found)):
        raise CacheConflict(f"'{repository.name}' is there and was not made by granary; give another --repo")


def _is_our_card(repository: Repository, found: Remote) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        text = fetch(repository, README, found.commit, Path(folder)).read_text(errors="replace")
    head = text.removeprefix("---\n").partition("\n---\n")[0]
    return text.startswith("---\n") and '"granary"' in head
