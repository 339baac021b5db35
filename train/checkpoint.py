"""Checkpoints of a run in training: one safetensors file, and a JSON file that names it and is written last."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from cache_spec.errors import UserError
from cache_spec.files import readable_json, write_file
from train.run_folder import LOG, STATE
from train.step import TrainRun

POINTER = "checkpoint.json"


def save_checkpoint(folder: Path, run: TrainRun) -> None:
    """Write a run's state; until it is whole, the checkpoint before stays the valid one."""
    file = folder / STATE / f"step_{run.n_done:09d}.safetensors"
    write_file(file, save({name: tensor.detach().cpu().contiguous() for name, tensor in run.state().items()}))
    write_file(folder / STATE / POINTER, readable_json({"file": file.name, "n_done": run.n_done}))
    for old in (folder / STATE).glob("step_*.safetensors"):
        if old != file:
            old.unlink()


def restore_checkpoint(folder: Path, run: TrainRun) -> None:
    """Take up the run where its checkpoint left it, and cut the log to that point; without a checkpoint from the start.

    Raises UserError if a file of the checkpoint is damaged.
    """
    pointer = folder / STATE / POINTER
    if pointer.exists():
        try:
            facts: dict[str, Any] = json.loads(pointer.read_text())
            run.restore(load((folder / STATE / facts["file"]).read_bytes()), facts["n_done"])
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint in {folder} is damaged ({error}); delete {folder} and train again"
            ) from None
    _cut_log(folder / LOG, run.n_done)


def remove_checkpoint(folder: Path) -> None:
    """A finished run needs none."""
    shutil.rmtree(folder / STATE, ignore_errors=True)


def append_log(folder: Path, facts: dict[str, Any]) -> None:
    """Add a line to log.jsonl."""
    with (folder / LOG).open("a") as log:
        log.write(json.dumps(facts) + "\n")


def _cut_log(log: Path, n_done: int) -> None:
    """Keep the lines up to a step; a line that a kill cut off is one of those after it."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] > n_done:
                break
        except json.JSONDecodeError:
            break
        kept.append(line + "\n")
    write_file(log, "".join(kept).encode())
