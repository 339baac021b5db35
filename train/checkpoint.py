"""Checkpoints of a run in training: the last two, each a safetensors file and a JSON file that is written after it.

A checkpoint counts if its JSON file is there and the checksums in it hold, so a kill at any moment leaves the one
before, and a damaged file costs a few steps, not the run.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from cache_spec.errors import CacheDamaged, UserError
from cache_spec.files import check_seal, crc32c, disk_full_as_error, read_json, readable_json, seal
from cache_spec.untrusted import json_of, read_bounded
from train.parallel.agree import check_copies, led
from train.parallel.gradients import copies
from train.run_folder import GO_ON, LOG, STATE, write_whole
from train.step import TrainRun
from train.stored import MOST_WEIGHTS

N_KEPT = 2
_BLOCK = 16 << 20
_log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, run: TrainRun) -> None:
    """Write a run's state, and delete all but the last two.

    The file holds all of it, however many processes train the run; all of them call this at the same step.
    """
    check_copies(run.spread, copies(run.sae), GO_ON)
    file = folder / STATE / f"step_{run.n_done:09d}.safetensors"
    if run.spread.latents.size > 1:
        from train.parallel.shards import write_tensors  # it imports DTensor, which takes a while

        n_bytes, checksum = write_tensors(file, run.state(), run.spread.latents, GO_ON)
    elif run.spread.leads:
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in run.state().items()})
        write_whole(file, data)
        n_bytes, checksum = len(data), f"{crc32c(data):08x}"
    if not run.spread.leads:
        return
    facts = {"n_done": run.n_done, "n_bytes": n_bytes, "tensors_crc32c": checksum}
    write_whole(file.with_suffix(".json"), readable_json(seal(facts)))
    kept = _checkpoints(folder)[:N_KEPT]
    for old in (folder / STATE).glob("step_*"):
        if old.with_suffix(".json") not in kept:
            old.unlink()


def restore_checkpoint(folder: Path, run: TrainRun) -> None:
    """Take up the run at its newest whole checkpoint, without one from the start, and cut the log to that point.

    Says so if a newer one is damaged; raises UserError if all are.
    """
    if run.spread.size > 1:
        _restore_together(folder, run)
        return
    files = _checkpoints(folder)
    for i, file in enumerate(files):
        try:
            tensors, n_done = _read(file)
            run.restore(tensors, n_done)
            break
        except (OSError, CacheDamaged, SafetensorError, KeyError, RuntimeError) as error:
            if i + 1 == len(files):
                raise _none_whole(folder, error) from None
            _log.warning("%s; going on from the checkpoint before it", error)
    _cut_log(folder / LOG, run.n_done)


def _restore_together(folder: Path, run: TrainRun) -> None:
    """The same by all processes that train the run, each its part."""
    step = led(run.spread, lambda: _newest_whole(folder))
    if step:
        file = folder / STATE / f"step_{step:09d}.safetensors"
        try:
            if run.spread.latents.size > 1:
                from train.parallel.shards import read_share

                run.restore(read_share(file, run.spread.latents), step)
            else:
                run.restore(load(file.read_bytes()), step)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise _none_whole(folder, error) from None
    if run.spread.leads:
        _cut_log(folder / LOG, run.n_done)


def _newest_whole(folder: Path) -> int:
    """Steps done at the newest checkpoint that is whole, 0 without any. Raises UserError if all are damaged."""
    discard_damaged(folder)
    files = _checkpoints(folder)
    try:
        return _check(files[0]) if files else 0
    except (OSError, CacheDamaged) as error:
        raise _none_whole(folder, error) from None


def _none_whole(folder: Path, error: Exception) -> UserError:
    return UserError(f"no checkpoint in {folder / STATE} is whole ({error}); delete {folder} and train the run again")


def discard_damaged(folder: Path) -> None:
    """Delete the newest checkpoints as far as they are not whole, saying so, if there is a whole one before them.

    From then on the newest is the one that training goes on from.
    """
    damaged: list[tuple[Path, Exception]] = []
    for file in _checkpoints(folder):
        try:
            _check(file)
        except (OSError, CacheDamaged) as error:
            damaged.append((file, error))
            continue
        for bad, why in damaged:
            _log.warning("%s; going on from the checkpoint before it", why)
            bad.unlink()
            bad.with_suffix(".safetensors").unlink(missing_ok=True)
        return


def checkpoint_step(folder: Path) -> int:
    """Steps done at the newest checkpoint, by its name; 0 without one."""
    return max((int(file.stem.removeprefix("step_")) for file in _checkpoints(folder)), default=0)


def remove_checkpoints(folder: Path) -> None:
    """A finished run needs none."""
    shutil.rmtree(folder / STATE, ignore_errors=True)


def append_log(folder: Path, facts: dict[str, Any]) -> None:
    """Add a line to log.jsonl."""
    line = json.dumps(facts) + "\n"
    with disk_full_as_error(folder / LOG, len(line), GO_ON), (folder / LOG).open("a") as log:
        log.write(line)


def last_logged(folder: Path) -> dict[str, Any]:
    """The last line of log.jsonl; empty without one."""
    lines = (folder / LOG).read_bytes().splitlines() if (folder / LOG).exists() else []
    return (_logged(lines[-1]) or {}) if lines else {}


def _logged(line: bytes) -> dict[str, Any] | None:
    """A line of log.jsonl; None if it is none, as a kill or a full disk leaves it."""
    try:
        facts = json_of(line, finite=True)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and type(facts.get("step")) is int else None


def _checkpoints(folder: Path) -> list[Path]:
    """The JSON files of the checkpoints, the newest first."""
    files = (folder / STATE).glob("step_*.json")
    return sorted((file for file in files if re.fullmatch("step_[0-9]{9,15}", file.stem)), reverse=True)


def _check(file: Path) -> int:
    """Number of steps. Raises CacheDamaged or OSError if anything is wrong; reads block by block."""
    facts, tensors, checksum, n_bytes = _sealed(file), file.with_suffix(".safetensors"), 0, 0
    if not tensors.is_file():
        raise CacheDamaged(f"{tensors} cannot be read: it is no plain file")
    with tensors.open("rb") as opened:
        while block := opened.read(_BLOCK):
            checksum, n_bytes = crc32c(block, checksum), n_bytes + len(block)
    if f"{checksum:08x}" != facts.get("tensors_crc32c"):
        raise CacheDamaged(_damaged(tensors, n_bytes))
    return facts["n_done"]


def _sealed(file: Path) -> dict[str, Any]:
    """What a checkpoint's JSON file says, which is of the step in its name. Raises CacheDamaged or OSError."""
    facts = check_seal(read_json(file), file)
    if type(facts.get("n_done")) is not int or int(file.stem.removeprefix("step_")) != facts["n_done"]:
        raise CacheDamaged(f"{file} is of step {facts.get('n_done')!r:.40}, not of the step in its name")
    return facts


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """Tensors and number of steps. Raises CacheDamaged, OSError, SafetensorError or KeyError if anything is wrong."""
    facts, tensors = _sealed(file), file.with_suffix(".safetensors")
    try:
        data = read_bounded(tensors, MOST_WEIGHTS)
    except ValueError as error:
        raise CacheDamaged(f"{tensors} cannot be read: {error}") from None
    if f"{crc32c(data):08x}" != facts.get("tensors_crc32c"):
        raise CacheDamaged(_damaged(tensors, len(data)))
    return load(data), facts["n_done"]


def _damaged(tensors: Path, n_bytes: int) -> str:
    return f"{tensors} has {n_bytes:,} bytes that do not match the checksum in {tensors.stem}.json"


def _cut_log(log: Path, n_done: int) -> None:
    """Keep the lines up to a step, without those that are damaged; one that a kill cut off is the last."""
    if not log.exists():
        return
    kept, is_damaged = [], False
    for line in log.read_bytes().splitlines():
        facts = _logged(line)
        if facts is None:
            is_damaged = True
            continue
        if facts["step"] > n_done:
            break
        if is_damaged:
            _log.warning("%s has damaged lines, which are left out", log)
            is_damaged = False
        kept.append(line + b"\n")
    write_whole(log, b"".join(kept))
