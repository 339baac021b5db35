"""One run of a sweep: its folder, what its run.json says, the SAE in training, and each of its steps."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_spec.files import remove_stale_partials
from cache_spec.seeds import derive_seed
from train.checkpoint import append_log, checkpoint_step, restore_checkpoint, save_checkpoint
from train.config import RunConfig
from train.engine import Kernel, Outcome
from train.loader import MixedBatchLoader
from train.mixing import Batch, Mixture
from train.names import find, parse_setting
from train.parallel.agree import led
from train.parallel.axis import ALONE, Spread
from train.run_folder import FAILED, TRAINING, read_facts, write_facts
from train.spans import LOG, MIX, span
from train.step import TrainRun, learning_rate
from train.tracking import OpenTracker, Tracker

_log = logging.getLogger(__name__)
LOG_EVERY = 100  # steps; short runs have a hundred lines


@dataclass(kw_only=True)
class Entry:
    """One run of the sweep; the SAE is there from `start` until the run is complete or has failed."""

    config: RunConfig
    folder: Path
    facts: dict[str, Any]
    kernel: Kernel
    spread: Spread = ALONE
    """Over which processes this one run is spread; all of them have an entry, and one writes its files."""
    run: TrainRun | None = None
    tracker: Tracker | None = None
    latest: dict[str, Any] = field(default_factory=dict)
    """The last line of the log that this process wrote."""
    failure: str = ""
    """Why training cannot go on, such as "its loss is nan"; empty if it can."""
    failed_step: int = 0
    _first_step: int = 0
    _finite: Tensor | None = None  # on the device, so that nobody has to wait for it: was every loss so far
    _n_finite: Tensor | None = None
    _corrupt: Any = None
    _strength: float = 0.0

    @property
    def training(self) -> TrainRun:
        assert self.run is not None
        return self.run

    @property
    def mixture(self) -> Mixture:
        """What decides its batches."""
        return Mixture(self.config.masked_fraction, self.config.masked_schedule, self.config.consistency > 0)

    def start(self, loader: MixedBatchLoader, open_tracker: OpenTracker | None) -> None:
        """Build the SAE, and take it up at its last checkpoint if there is one."""
        device = str(loader.device)
        self.run = TrainRun(
            self.config,
            loader.hook.d_model,
            loader.n_steps,
            self.kernel,
            device=device,
            d_out=loader.d_out if loader.data.target_hook else None,
            spread=self.spread,
        )
        if self.config.corrupt:
            name, self._strength = parse_setting(self.config.corrupt, "corruption")
            self._corrupt = getattr(find("corruptions", name), name)
        if self.spread.leads:
            if read_facts(self.folder) is None:
                write_facts(self.folder, self.facts)
            remove_stale_partials(self.folder)
        restore_checkpoint(self.folder, self.run)
        self._first_step = self.run.n_done
        self._note("kernel", self.kernel.name, "--kernel {}")
        if self.spread.size > 1 or "spread" in self.facts:
            self._note("spread", str(self.spread), "{}")
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._n_finite = torch.zeros((), dtype=torch.int64, device=device)
        if open_tracker is not None and self.spread.leads:
            self.tracker = open_tracker(self.folder, self.facts, self.run.n_done)

    def _note(self, fact: str, now: str, words: str) -> None:
        """Say and write down that training goes on in another way than so far: another kernel, other processes."""
        so_far = self.facts.get(fact, str(ALONE))
        if so_far.split(", ")[-1] == now:
            return
        if self._first_step:
            _log.warning(
                "%s was trained with %s so far and goes on with %s: the same to rounding, not to the bit",
                self.config.name,
                words.format(so_far),
                now,
            )
        self.facts[fact] = f"{so_far}, {now}" if self._first_step else now
        self._write_facts()

    def _write_facts(self) -> None:
        if self.spread.leads:
            write_facts(self.folder, self.facts)

    def step(self, batch: Batch, loader: MixedBatchLoader, checkpoint_every: int) -> None:
        """One step, with its log line and its checkpoint when they are due. Sets `failure` instead of going on."""
        run = self.training
        with span(MIX):
            x, target = self._views(batch, loader)
        if self.config.consistency:
            outcome = run.step(x, target, twin=batch.twin, paired=batch.paired)
        else:
            outcome = run.step(x, target)
        with span(LOG):
            self._after(outcome, target, loader, checkpoint_every)

    def _after(self, outcome: Outcome, target: Tensor, loader: MixedBatchLoader, checkpoint_every: int) -> None:
        run = self.training
        last = run.n_done == loader.n_steps
        checkpoint = run.n_done % checkpoint_every == 0 and not last
        every = max(1, min(LOG_EVERY, loader.n_steps // LOG_EVERY))
        log = last or checkpoint or run.n_done % every == 0
        self._count_finite(outcome.loss)
        if log or loader.device.type == "cpu":  # elsewhere a look would make everybody wait for the device
            self._look(outcome.loss, at_weights=last or checkpoint)
        if self.failure:
            return
        if log:
            self._log(outcome, target)
        if checkpoint:
            save_checkpoint(self.folder, run)

    def keep(self) -> None:
        """Write a checkpoint of where the run is, unless there is one or its numbers are not finite."""
        if self.run is None or self.run.n_done in (0, led(self.spread, lambda: checkpoint_step(self.folder))):
            return
        self._look(None, at_weights=True)
        if not self.failure:
            save_checkpoint(self.folder, self.run)

    def _views(self, batch: Batch, loader: MixedBatchLoader) -> tuple[Tensor, Tensor]:
        x = batch.x
        if self._corrupt is not None:
            seed = derive_seed("train/corrupt", self.config.seed, self.training.n_done)
            x = self._corrupt(x, self._strength, torch.Generator(x.device).manual_seed(seed))
        itself = loader.data.target == "self" and not loader.data.target_hook
        return x, x if itself else batch.target

    def _count_finite(self, loss: Tensor) -> None:
        assert self._finite is not None
        assert self._n_finite is not None
        self._finite &= loss.isfinite()
        self._n_finite += self._finite

    def _look(self, loss: Tensor | None, *, at_weights: bool) -> None:
        """Set `failure` if a loss was not finite, or a weight is not."""
        run = self.training
        assert self._n_finite is not None
        n_finite = int(self._n_finite)
        if n_finite < run.n_done - self._first_step:
            value = "not finite" if loss is None else loss.item()
            self.failure, self.failed_step = f"its loss is {value}", self._first_step + n_finite + 1
        elif at_weights and not self._has_finite_weights():
            self.failure, self.failed_step = "its weights are not finite", run.n_done

    def _has_finite_weights(self) -> bool:
        tensors = self.training.sae.state_dict().values()
        n_bad = sum(not bool(tensor.isfinite().all()) for tensor in tensors)
        return not self.spread.all.count(n_bad, torch.empty(0))

    def fail(self) -> None:
        """Write down that the run failed, and let go of the SAE; its last good checkpoint stays."""
        self.run = None
        kept = led(self.spread, lambda: checkpoint_step(self.folder))
        failure = {"step": self.failed_step, "reason": self.failure, "checkpoint": kept}
        self.facts |= {"status": FAILED, "failure": failure}
        self._write_facts()
        self.close_tracker()

    def close_tracker(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()
            self.tracker = None

    def _log(self, outcome: Outcome, target: Tensor) -> None:
        self.latest = log_line(self.training, outcome, target)
        if self.spread.leads:
            append_log(self.folder, self.latest)
        if self.tracker is not None:
            self.tracker.log(self.latest)

    @property
    def is_waiting(self) -> bool:
        """Whether there is something left to train or to write."""
        return self.facts["status"] == TRAINING


@torch.no_grad()
def log_line(run: TrainRun, outcome: Outcome, target: Tensor) -> dict[str, Any]:
    """What log.jsonl says of a step; None where a number is none."""
    rows = run.spread.rows
    error = rows.total((target[rows.share(len(target))] - outcome.reconstruction).square().sum())
    variance = (target - target.mean(0)).square().sum()
    explained = (1 - error / variance).item()
    return {
        "step": run.n_done,
        "tokens": run.n_done * len(target),
        "loss": outcome.loss.item(),
        "explained_variance": explained if math.isfinite(explained) else None,
        "l0": outcome.n_active.item() / len(target),
        "n_dead": int(run.spread.latents.total(run.dead().sum())),
        "lr": learning_rate(run.config, run.n_done - 1, run.n_steps),
    }
