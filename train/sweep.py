"""A sweep: every run of a grid trained from one read of the cache, their steps interleaved."""

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.files import remove_stale_partials
from cache_spec.progress import Progress
from cache_spec.seeds import derive_seed
from train.checkpoint import append_log, remove_checkpoint, restore_checkpoint, save_checkpoint
from train.config import RunConfig
from train.facts import differing_facts, run_facts
from train.held_out import held_out_rows, measure_held_out
from train.kernels._select import Kernel, select
from train.loader import Batch, MixedBatchLoader
from train.names import find, parse_setting
from train.recipe import Forward
from train.run_folder import COMPLETE, check_out, finish_run, holds_files, read_facts, write_facts
from train.step import TrainRun, learning_rate

LOG_LINES = 100  # a run
_log = logging.getLogger(__name__)


class Unfinished(UserError):
    """Training broke off; what was saved before stays."""

    exit_code = 1


@dataclass(kw_only=True)
class _Entry:
    """One run of the sweep: its folder, what run.json says, and the SAE in training (None once it is complete)."""

    config: RunConfig
    folder: Path
    facts: dict[str, Any]
    run: TrainRun | None = None
    corrupt: Any = None
    strength: float = 0.0
    latest_loss: float = field(default=math.nan)

    @property
    def training(self) -> TrainRun:
        assert self.run is not None
        return self.run


def train_sweep(
    loader: MixedBatchLoader,
    configs: Sequence[RunConfig],
    *,
    out: Path,
    kernel: str = "auto",
    checkpoint_every: int = 1000,
    resume: bool = False,
    n_threads: int = 1,
) -> list[dict[str, Any]]:
    """Train all runs and write each into `out`/<name>; returns what their run.json says in the end.

    Every run sees the same rows in the same order. With `resume`, complete runs are skipped and the others go on
    from their checkpoints, to the bit as if nothing had happened. Several runs share `n_threads` of a CPU, and how
    many there are decides how many threads one gets. Raises UserError, before anything is written, for a folder
    that holds another run of the same name, and Unfinished if a loss is not finite.
    """
    chosen = select(kernel, loader.device.type)
    entries = _prepare(loader, configs, out, chosen, resume)
    for entry in entries:
        if entry.facts["status"] == COMPLETE:
            remove_checkpoint(entry.folder)  # a kill may have come before this
    waiting = [entry for entry in entries if entry.facts["status"] != COMPLETE]
    if waiting:
        rows = held_out_rows(loader)  # before training: it finds damage early
        for entry in waiting:
            _start(entry, loader, chosen)
        _train(loader, waiting, checkpoint_every, min(len(configs), n_threads), n_threads)
        _finish(loader, waiting, rows)
    return [entry.facts for entry in entries]


def _prepare(
    loader: MixedBatchLoader, configs: Sequence[RunConfig], out: Path, kernel: Kernel, resume: bool
) -> list[_Entry]:
    """Check every folder before the first is touched."""
    check_out(out)
    entries = []
    for config in configs:
        folder = out / config.name
        facts, old = run_facts(config, loader, kernel), read_facts(folder)
        if old is not None:
            _check_same(folder, old, facts, resume)
            facts = old
        elif folder.exists() and (not folder.is_dir() or holds_files(folder)):
            raise UserError(f"{folder} is there and is no run; move it away or name another --out")
        entries.append(_Entry(config=config, folder=folder, facts=facts))
    return entries


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any], resume: bool) -> None:
    if differences := differing_facts(old, new):
        raise UserError(f"{folder} holds another run: {'; '.join(differences)}; name another --out")
    if not resume:
        state = "complete" if old["status"] == COMPLETE else "unfinished"
        then = "skip it" if old["status"] == COMPLETE else "go on with it"
        raise UserError(f"{folder} holds this run already, {state}; add --resume to {then}, or name another --out")


def _start(entry: _Entry, loader: MixedBatchLoader, kernel: Kernel) -> None:
    entry.run = TrainRun(entry.config, loader.hook.d_model, loader.n_steps, kernel, str(loader.device))
    if entry.config.corrupt:
        name, entry.strength = parse_setting(entry.config.corrupt, "corruption")
        entry.corrupt = getattr(find("corruptions", name), name)
    if read_facts(entry.folder) is None:
        entry.folder.mkdir(parents=True, exist_ok=True)
        write_facts(entry.folder, entry.facts)
    remove_stale_partials(entry.folder)
    restore_checkpoint(entry.folder, entry.run)


def _train(
    loader: MixedBatchLoader, entries: list[_Entry], checkpoint_every: int, n_workers: int, n_threads: int
) -> None:
    """Run all steps, several runs at a time; meanwhile this thread reads the next rows."""
    if new := [entry for entry in entries if entry.training.n_done == 0]:
        start = loader.read(0, with_masked=False).clean
        for entry in new:
            entry.training.start_at(start)
    first = min(entry.training.n_done for entry in entries)
    if first == loader.n_steps:  # stopped after the last step
        return
    with_masked = any(entry.config.masked_fraction for entry in entries)
    progress = Progress(f"training {len(entries)} SAEs", loader.n_steps - first, "steps")
    with _workers(n_workers, max(1, n_threads // n_workers)) as pool, progress, _kept_at_ctrl_c(entries, pool):
        rows = loader.read(first, with_masked=with_masked)
        for step in range(first, loader.n_steps):
            _announce_epoch(loader, step)
            current = [entry for entry in entries if entry.training.n_done == step]
            fractions = {entry.config.masked_fraction for entry in current}
            mixed = {fraction: rows.mix(fraction, loader.data.target) for fraction in fractions}
            futures = [
                pool.submit(_step, entry, mixed[entry.config.masked_fraction], loader, checkpoint_every)
                for entry in current
            ]
            if step + 1 < loader.n_steps:
                rows = loader.read(step + 1, with_masked=with_masked)
            for future in futures:
                future.result()
            progress.advance(note=_note(entries) if step % 50 == 0 else "")


def _finish(loader: MixedBatchLoader, entries: list[_Entry], rows: Tensor | None) -> None:
    """Measure and write every run; all have a checkpoint first, so a full disk at one costs the others nothing."""
    with _kept_at_ctrl_c(entries):
        for entry in entries:
            save_checkpoint(entry.folder, entry.training)
        for entry in entries:
            entry.facts |= measure_held_out(entry.training, rows)
            entry.facts["tokens_seen"] = loader.n_steps * loader.data.batch_size
            finish_run(entry.folder, entry.training.sae, entry.facts)
            entry.facts["status"] = COMPLETE
            remove_checkpoint(entry.folder)


@contextmanager
def _kept_at_ctrl_c(entries: list[_Entry], pool: ThreadPoolExecutor | None = None) -> Iterator[None]:
    """At Ctrl-C write a checkpoint of every unfinished run, and say how to go on. A second Ctrl-C stops at once."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if pool is not None:
            pool.shutdown()  # a step that is half done is no state to keep
        unfinished = [entry for entry in entries if entry.facts["status"] != COMPLETE]
        for entry in unfinished:
            if entry.training.n_done:
                save_checkpoint(entry.folder, entry.training)
        if not unfinished:
            raise
        step = min(entry.training.n_done for entry in unfinished)
        raise KeyboardInterrupt(f"add --resume to go on from step {step:,}") from interrupt


@contextmanager
def _workers(n_workers: int, n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that step runs, each with its share of torch's own threads.

    This thread gets a share too: torch's threads wait by spinning, and more of them than cores cost far more than
    they bring (measured: ten times the time of a step).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(n_threads,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _announce_epoch(loader: MixedBatchLoader, step: int) -> None:
    epoch, batch = loader.position(step)
    if batch == 0 and epoch > 0:
        _log.info("step %s: all %s rows were read %s; again", f"{step:,}", f"{loader.n_rows:,}", _times(epoch))


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _note(entries: list[_Entry]) -> str:
    losses = [entry.latest_loss for entry in entries if not math.isnan(entry.latest_loss)]
    return f"mean loss {sum(losses) / len(losses):.4f}" if losses else ""


def _step(entry: _Entry, batch: Batch, loader: MixedBatchLoader, checkpoint_every: int) -> None:
    """One step of one run, with its log line and its checkpoint when they are due."""
    run = entry.training
    x = batch.x
    if entry.corrupt is not None:
        seed = derive_seed("train/corrupt", entry.config.seed, run.n_done)
        x = entry.corrupt(x, entry.strength, torch.Generator(x.device).manual_seed(seed))
    target = x if loader.data.target == "self" else batch.target
    forward, loss = run.step(x, target)
    last = run.n_done == loader.n_steps
    checkpoint = run.n_done % checkpoint_every == 0 and not last
    if last or checkpoint or run.n_done % max(1, loader.n_steps // LOG_LINES) == 0:
        line = _log_line(run, forward, loss, target)
        if not math.isfinite(line["loss"]):
            raise Unfinished(
                f"the loss of {entry.config.name} is {line['loss']} at step {run.n_done}; train it with a lower --lr "
                "into another --out"
            )
        entry.latest_loss = line["loss"]
        append_log(entry.folder, line)
    if checkpoint:
        save_checkpoint(entry.folder, run)


@torch.no_grad()
def _log_line(run: TrainRun, forward: Forward, loss: Tensor, target: Tensor) -> dict[str, Any]:
    error = (target - forward.reconstructions[-1]).square().sum()
    variance = (target - target.mean(0)).square().sum()
    return {
        "step": run.n_done,
        "tokens": run.n_done * len(target),
        "loss": loss.item(),
        "explained_variance": (1 - error / variance).item(),
        "l0": (forward.f > 0).sum().item() / len(target),
        "n_dead": int(run.dead().sum()),
        "lr": learning_rate(run.config, run.n_done - 1, run.n_steps),
    }
