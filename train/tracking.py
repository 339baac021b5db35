"""Where else the log goes, on request: Weights & Biases, Trackio or TensorBoard. Imported only when asked for."""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cache_spec.errors import UserError

PROJECT = "granary"
_MODULES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


class Tracker(Protocol):
    """One run's log somewhere else."""

    def log(self, line: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


OpenTracker = Callable[[Path, dict[str, Any], int], Tracker]
"""(run's folder, what its run.json says, steps done) -> its tracker."""


def open_trackers(name: str) -> OpenTracker | None:
    """What opens a run's tracker; None for "". Raises UserError for an unknown name or a package that is missing."""
    if not name:
        return None
    if name not in _MODULES:
        raise UserError(f"--track {name} is unknown; it is one of {', '.join(_MODULES)}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UserError(
            f"--track {name} needs the package {name}, which cannot be imported here ({error}); "
            f"pip install {name}, or leave --track out: log.jsonl in each run's folder has the same numbers"
        ) from None
    if name == "tensorboard":
        return lambda folder, facts, n_done: _Board(module, folder, n_done)
    if name == "trackio":
        return lambda folder, facts, n_done: _Service(
            module.init(project=PROJECT, name=_name(folder), config=_flat(facts), resume="allow")
        )
    return lambda folder, facts, n_done: _Service(_wandb_run(module, folder, facts))


def _wandb_run(wandb: Any, folder: Path, facts: dict[str, Any]) -> Any:
    """A run beside those of the other SAEs; the same one again when training is resumed."""
    key = f"{folder.resolve()} {facts['cache']['cache_id']}"
    try:
        return wandb.init(
            project=PROJECT,
            name=_name(folder),
            id=hashlib.sha256(key.encode()).hexdigest()[:16],
            config=_flat(facts),
            dir=str(folder),
            resume="allow",
            reinit="create_new",
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases could not start ({error}); set WANDB_MODE=offline, or `wandb login`"
        ) from None


def _name(folder: Path) -> str:
    """Of a run among all that were ever tracked: its folder's and the name of --out."""
    return f"{folder.parent.name}.{folder.name}"


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that a person would filter runs by."""
    chosen = {"recipe": facts["recipe"], "cache_id": facts["cache"]["cache_id"], "model": facts["cache"]["model"]}
    return {**facts["config"], **{f"data.{key}": value for key, value in facts["data"].items()}, **chosen}


class _Service:
    """wandb's and trackio's runs have the same two methods."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, line: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in line.items() if value is not None}, step=line["step"])

    def finish(self) -> None:
        self._run.finish()


class _Board:
    """TensorBoard's files, in the run's folder: `tensorboard --logdir RUNS` shows all runs."""

    def __init__(self, module: Any, folder: Path, n_done: int) -> None:
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=n_done + 1)

    def log(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if value is not None and key != "step":
                self._writer.add_scalar(key, value, line["step"])

    def finish(self) -> None:
        self._writer.close()
