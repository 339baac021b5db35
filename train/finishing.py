"""The end of runs: their thresholds calibrated, measured on held-out rows, and written."""

from collections.abc import Callable

from torch import Tensor

from train.calibration import calibrate, calibration_rows, has_running_threshold
from train.checkpoint import last_logged, remove_checkpoints, save_checkpoint
from train.entry import Entry
from train.held_out import measure_held_out
from train.loader import MixedBatchLoader
from train.parallel.agree import led
from train.run_folder import COMPLETE, finish_run

HeldOut = tuple[Tensor | None, Tensor | None]
"""Rows, and a transcoder's targets."""


def finish(entries: list[Entry], loader: MixedBatchLoader, held_out: HeldOut, heed_signals: Callable[[], None]) -> None:
    """Measure and write every run; all have a checkpoint first, so a full disk at one costs the others nothing.
    `heed_signals` as `stopping_together` gives it."""
    for entry in entries:
        save_checkpoint(entry.folder, entry.training)
    wanted = any(entry.config.calibrate and has_running_threshold(entry.training.sae) for entry in entries)
    rows = calibration_rows(loader) if wanted else []
    for entry in entries:
        heed_signals()
        _finish_one(entry, loader, rows, held_out)


def _finish_one(entry: Entry, loader: MixedBatchLoader, rows: list[Tensor], held_out: HeldOut) -> None:
    run = entry.training
    norm_factor = loader.target_scale.norm_factor  # the codes' units: for an SAE, those of its input
    entry.facts["training_l0"] = led(entry.spread, lambda: last_logged(entry.folder).get("l0"))
    entry.facts["calibration"] = (
        calibrate(run.sae, entry.config.k, rows, norm_factor)
        if entry.config.calibrate and has_running_threshold(run.sae)
        else None
    )
    entry.facts |= measure_held_out(run, *held_out)
    entry.facts["tokens_seen"] = loader.n_steps * loader.data.batch_size
    finish_run(entry.folder, run.sae, entry.facts)
    entry.facts["status"] = COMPLETE
    entry.close_tracker()
    entry.run = None
    if entry.spread.leads:
        remove_checkpoints(entry.folder)
