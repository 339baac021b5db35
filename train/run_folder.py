"""A run's folder: a SAELens v6 SAE (cfg.json, sae_weights.safetensors), run.json, log.jsonl; state/ until it is whole.

The saved SAE takes raw activations: the norm factor is folded into biases and thresholds. run.json says
"complete" last of all, so a run that says so is whole.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
from safetensors.torch import save

from cache_spec.errors import CacheDamaged, UserError
from cache_spec.files import PARTIAL, Partial, disk_full_as_error, readable_json, seal, sync_folder
from cache_spec.untrusted import json_of, read_bounded, refuse_links
from train.known import check_parts
from train.sae import SparseAutoencoder
from train.saelens import assemble, fold, saelens_config
from train.stored import read_object, read_safetensors

CFG, WEIGHTS, FACTS, LOG, STATE = "cfg.json", "sae_weights.safetensors", "run.json", "log.jsonl", "state"
_BLOCK = 2**24  # bytes read at a time
SEAL = "crc32c"  # in FACTS, last
LOCK = "lock"  # in STATE, so it goes when the run is complete
TRAINING, COMPLETE, FAILED = "training", "complete", "failed"
GO_ON = "run the same command with --resume"


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A finished run: the SAE in use (raw activations in, reconstruction out) and what run.json says."""

    path: Path
    sae: SparseAutoencoder
    facts: dict[str, Any]


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file in one step. Raises DiskFull, which says how to go on."""
    with disk_full_as_error(path, len(data), GO_ON), Partial(path) as partial:
        partial.write(data)
        partial.sync()
        partial.replace()
        sync_folder(path.parent)


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json in one step, with a checksum of what it says."""
    write_whole(folder / FACTS, readable_json(seal(without_seal(facts))))


def without_seal(facts: dict[str, Any]) -> dict[str, Any]:
    """What run.json says, without its checksum."""
    return {name: fact for name, fact in facts.items() if name != SEAL}


def unsealed(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a run.json says, however it is spelled. Raises UserError if a bit of it changed.

    An old one without a checksum is taken as it is; one whose checksum lost its name is not.
    """
    last = next(reversed(facts.values()), None)
    lost = SEAL not in facts and isinstance(last, str) and re.fullmatch(r"[0-9a-f]{8}", last)
    if lost or (SEAL in facts and facts != seal(without_seal(facts))):
        raise UserError(
            f"{path} does not match its own checksum, so it was changed after it was written; put it back as it was, "
            f"or delete its line {SEAL} if the change is yours"
        )
    return without_seal(facts)


def sum_of(path: Path) -> dict[str, Any]:
    """What run.json says of another file of the run."""
    total, n_bytes = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total, n_bytes = google_crc32c.extend(total, block), n_bytes + len(block)
    return {"bytes": n_bytes, "crc32c": f"{total:08x}"}


def finish_run(folder: Path, sae: SparseAutoencoder, facts: dict[str, Any]) -> None:
    """Write the SAE, and then run.json with the status "complete" and the checksums of the other files.

    All processes that train it call this, and one of them writes.
    """
    tensors = fold(sae, facts["norm_factor"], facts.get("target_norm_factor"))
    if sae.spread.latents.size > 1:
        from train.parallel.shards import write_tensors  # it imports DTensor, which takes a while

        write_tensors(folder / WEIGHTS, tensors, sae.spread.latents, GO_ON)
    elif sae.spread.leads:
        write_whole(folder / WEIGHTS, save(tensors))
    if not sae.spread.leads:
        return
    write_whole(folder / CFG, readable_json(saelens_config(sae, facts)))
    write_facts(
        folder, {**facts, "status": COMPLETE, "files": {name: sum_of(folder / name) for name in (WEIGHTS, CFG)}}
    )


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if it is not there. Raises UserError if another process holds it.

    The system lets go when the process ends, however it ends. A folder in which no run began goes away again.
    """
    fd = _lock(folder)
    try:
        yield
    finally:
        if not (folder / FACTS).exists():
            with suppress(OSError):  # somebody put something into it
                (folder / STATE / LOCK).unlink()
                (folder / STATE).rmdir()
                folder.rmdir()
        os.close(fd)


def _lock(folder: Path) -> int:
    while True:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / STATE / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UserError(
                f"{folder} is in training by another process now; wait for it, or name another --out"
            ) from None
        if os.fstat(fd).st_nlink:  # 0: whoever held it deleted it with the checkpoints
            return fd
        os.close(fd)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None if there is none. Raises UserError if it is mangled, or for a link in the folder."""
    try:
        data = read_bounded(folder / FACTS)
        refuse_links(folder, "a run's folder has none: put the file itself there, or move the folder away")
        facts = json_of(data, finite=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except CacheDamaged as error:
        raise UserError(str(error)) from None
    except ValueError as error:
        raise UserError(f"{folder / FACTS} is not JSON ({error}); move {folder} away and train it again") from None
    if not isinstance(facts, dict):
        raise UserError(f"{folder / FACTS} is not a JSON object; move {folder} away and train it again")
    if facts.get("status") not in (TRAINING, COMPLETE, FAILED):
        raise UserError(
            f"{folder / FACTS} has no status that a run can have ({facts.get('status')!r:.40}); move {folder} away and "
            "train it again"
        )
    check_parts(facts, folder / FACTS)
    return unsealed(facts, folder / FACTS)


def failure_of(facts: dict[str, Any]) -> str:
    """What became of a failed run: "batchtopk_k20 failed at step 312 (its loss is nan); ..."."""
    said = facts.get("failure")
    failure = said if isinstance(said, dict) else {}
    kept = failure.get("checkpoint")
    return (
        f"{facts.get('name')} failed at step {failure.get('step')!s:.20} ({failure.get('reason')!s:.80}; "
        f"{f'its last good checkpoint is step {kept!s:.20}' if kept else 'it has no checkpoint'})"
    )


def load_run(path: str | Path, device: str = "cpu") -> TrainedRun:
    """The finished run in a folder. Raises UserError if there is none, it is unfinished, or a file is damaged."""
    folder = Path(path)
    facts = read_facts(folder)
    if facts is None:
        raise UserError(f"{folder} is not a run: it has no {FACTS}; give a folder that `python -m train` wrote")
    if facts["status"] == FAILED:
        raise UserError(f"{folder} is no SAE: {failure_of(facts)}")
    if facts["status"] != COMPLETE:
        raise UserError(f"{folder} is not finished; run the same `python -m train` command with --resume")
    try:
        sae = assemble(read_object(folder / CFG), read_safetensors(folder / WEIGHTS))
        _check_files(folder, facts)
    except (UserError, OSError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())  # torch's has lines
        raise UserError(f"{folder} is damaged ({why}); move it away and train the run again") from None
    return TrainedRun(path=folder, sae=sae.to(device).eval().requires_grad_(False), facts=facts)


def _check_files(folder: Path, facts: dict[str, Any]) -> None:
    """Raises UserError if a file is not what run.json says; one from before it said anything of them says nothing."""
    said = facts.get("files")
    for name, wanted in said.items() if isinstance(said, dict) else ():
        if name in (CFG, WEIGHTS) and sum_of(folder / name) != wanted:
            raise UserError(f"{name} does not match its checksum in {FACTS}")


def check_out(out: Path) -> None:
    """Raises UserError if `out` is a file, or holds things and no run: a run's folder would get lost among them."""
    out = out.resolve()  # new/.. is no new folder
    if not out.exists():
        if above := next((folder for folder in out.parents if folder.exists() and not folder.is_dir()), None):
            raise UserError(f"--out {out} lies under {above}, which is a file; name a folder for the runs")
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder for the runs")
    entries = [entry for entry in out.iterdir() if not entry.name.startswith(".")]
    foreign = [entry for entry in entries if not _may_stand_among_runs(entry)]
    if foreign and not any((entry / FACTS).exists() for entry in entries):
        raise UserError(f"--out {out} holds {foreign[0].name} and no runs; name a new or empty folder")


def _may_stand_among_runs(entry: Path) -> bool:
    if entry.is_dir():
        return (entry / FACTS).exists() or not holds_files(entry)
    return re.fullmatch(r"report\.(json|html)", entry.name) is not None


def holds_files(folder: Path) -> bool:
    """Whether there is anything in it but what a process that was killed at once leaves."""
    inside = [entry for entry in folder.iterdir() if not entry.name.endswith(PARTIAL)]
    return any(
        entry.name != STATE
        or entry.is_symlink()
        or not entry.is_dir()
        or {file.name for file in entry.iterdir()} - {LOCK}
        for entry in inside
    )
