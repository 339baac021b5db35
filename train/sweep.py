"""A sweep: every run of a grid trained from one read of the cache, or from a few if they do not fit into memory."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_spec.errors import CacheDamaged, RoomTooSmall, StoreError, UserError
from cache_spec.progress import Progress
from train.checkpoint import checkpoint_step, discard_damaged
from train.choosing import kernels_for
from train.config import RunConfig
from train.entry import Entry
from train.finishing import HeldOut, finish
from train.held_out import held_out_rows, held_out_targets
from train.loader import MixedBatchLoader
from train.mixing import Rows
from train.parallel.agree import StoppedTogether, led, stopping_together
from train.parallel.limits import least_memory, refuse_spread
from train.passes import needed_bytes, passes_sentence, split, threads_of
from train.preparing import hold_folder, hold_together, last_checkpoint, prepare, share_of
from train.profile import PROFILE, profiling
from train.ranks import Team, alone
from train.reading import before_training
from train.run_folder import (
    FAILED,
    GO_ON,
    failure_of,
)
from train.schedule import epoch_ended
from train.spans import MIX, SAE_STEP, WAIT, span
from train.tracking import OpenTracker
from train.watch import JobEnded
from train.workers import Workers, workers

_NOTE_EVERY = 20  # steps
_log = logging.getLogger(__name__)


class Unfinished(UserError):
    """Training broke off or a run failed; what was saved before stays."""

    exit_code = 1


def train_sweep(
    loader: MixedBatchLoader,
    configs: Sequence[RunConfig],
    *,
    out: Path,
    kernel: str = "auto",
    checkpoint_every: int = 1000,
    resume: bool = False,
    n_threads: int = 1,
    memory: int | None = None,
    open_tracker: OpenTracker | None = None,
    profile: bool = False,
    team: Team | None = None,
) -> list[dict[str, Any]]:
    """Train all runs and write each into `out`/<name>; returns what their run.json says in the end.

    Every run sees the same rows in the same order, and on a CPU ends with the same bits whatever trains beside it.
    With `resume`, complete runs are skipped and the others go on from their checkpoints, to the bit as if nothing had
    happened. Runs that do not fit into `memory` bytes together (None: any) are trained in several passes over the
    cache. A run whose loss is not finite ends with the status "failed", and the others go on. With `profile` a few
    steps of the first pass are profiled, which changes no result (train/profile.py). Raises UserError, before anything
    is written, for a folder that holds another run of the same name or that another process trains.

    A `team` of several ranks calls this with the same arguments on each. Its `parallel` says whether they share the
    runs, or train each run together: then one rank writes its files, and the runs take turns.
    """
    team = team or alone()
    spread = team.spread
    refuse_spread(configs, loader, spread)
    entries = prepare(loader, configs, out, kernels_for(loader, configs, kernel, spread), resume, spread)
    if not any(entry.is_waiting for entry in entries) and profile:
        _log.info("nothing is left to train, so there is nothing to profile")
    own, memory = share_of(entries, loader, team), least_memory(spread, memory)
    names = {entry.config.name for entry in own}
    fit = partial(split, loader=loader, n_threads=n_threads, free=memory, kernel=kernel, spread=spread)
    n_passes = len(fit([entry.config for entry in own]))  # refuses what does not fit
    n_passes = max(team.gather(n_passes))  # so all ranks have looked at the folders before the first writes
    team.on_loss(lambda: last_checkpoint(entries))
    held_out: HeldOut = (None, None)
    if own:
        with before_training():
            held_out = held_out_rows(loader), held_out_targets(loader)
    with ExitStack() as held:
        for entry in entries:
            if spread.size > 1:
                hold_together(entry, held)
            elif entry.config.name in names or (team.is_first and not entry.is_waiting):
                hold_folder(entry, held)
        waiting = [entry for entry in own if entry.is_waiting]
        by_name = {entry.config.name: entry for entry in waiting}
        at_least = n_passes if team.rank.count > 1 and spread.size == 1 else 1
        passes = fit([entry.config for entry in waiting], at_least=at_least)
        if len(passes) > 1:
            needed = needed_bytes([entry.config for entry in waiting], loader, n_threads, kernel, spread)
            _log.info("%s", passes_sentence(passes, needed, memory))
        trace = out / PROFILE if profile else None
        sweep = _Sweep(loader, checkpoint_every, n_threads, open_tracker, held_out, trace, team)
        sweep.run([[by_name[config.name] for config in part] for part in passes])
    return _facts(entries, own, team)


def _facts(entries: Sequence[Entry], own: Sequence[Entry], team: Team) -> list[dict[str, Any]]:
    """What run.json says of every run in the end, whoever trained it."""
    trained = {facts["name"]: facts for each in team.gather([entry.facts for entry in own]) for facts in each}
    return [trained.get(entry.config.name, entry.facts) for entry in entries]


def failures_sentence(facts: Sequence[dict[str, Any]]) -> str:
    """What became of the failed runs, and what to do; empty if none failed."""
    failed = [fact for fact in facts if fact["status"] == FAILED]
    if not failed:
        return ""
    return (
        f"{len(failed)} of {len(facts)} runs failed: {'; '.join(map(failure_of, failed))}. The same recipe would fail "
        "again: train these with a lower --lr, or another --clip-norm, into another --out"
    )


def _newest_step(entry: Entry) -> int:
    discard_damaged(entry.folder)
    return checkpoint_step(entry.folder)


class _Sweep:
    """What the passes of one sweep share."""

    def __init__(
        self,
        loader: MixedBatchLoader,
        checkpoint_every: int,
        n_threads: int,
        open_tracker: OpenTracker | None,
        held_out: HeldOut,
        profile: Path | None,
        team: Team,
    ) -> None:
        self._team = team
        self._loader, self._open_tracker, self._held_out = loader, open_tracker, held_out
        self._checkpoint_every, self._n_threads = checkpoint_every, n_threads
        self._profile = profile  # where to; only the first steps of all are profiled

    def run(self, passes: list[list[Entry]]) -> None:
        """Train and finish one pass after the other."""
        loader, entries = self._loader, [entry for part in passes for entry in part]
        if not entries and self._team.rank.count == 1:
            return
        n_left = led(self._team.spread, lambda: sum(loader.n_steps - _newest_step(entry) for entry in entries))
        what = f"training {len(entries)} {'SAE' if len(entries) == 1 else 'SAEs'}"
        if self._team.rank.count > 1:
            spread = self._team.spread
            what += f", {spread}" if spread.size > 1 else f" on rank 0 of {self._team.rank.count}"
        with (
            Progress(what, n_left, "SAE steps", shown=self._team.is_first) as progress,
            stopping_together(self._team.spread, self._team.has_lost) as heed_signals,  # one for all passes
        ):
            for i, part in enumerate(passes):
                if len(passes) > 1:
                    _log.info("pass %s of %s: %s SAEs", i + 1, len(passes), len(part))
                with (
                    _closed(part),
                    _kept_at_ctrl_c(part),
                    _kept_at_damage(part),
                    _memory_as_sentence(),
                ):
                    for entry in part:
                        entry.start(loader, self._open_tracker)
                    self._train(part, progress, heed_signals)
                    finish([entry for entry in part if entry.run is not None], loader, self._held_out, heed_signals)

    def _train(self, entries: list[Entry], progress: Progress, heed_signals: Callable[[], None]) -> None:
        """Run all steps of one pass; meanwhile the loader reads ahead."""
        loader = self._loader
        if new := [entry for entry in entries if entry.training.n_done == 0]:
            start = loader.read(0, with_masked=False)
            for entry in new:
                entry.training.start_at(start.clean, start.target_clean)
        first = min((entry.training.n_done for entry in entries), default=loader.n_steps)
        if first == loader.n_steps and self._team.rank.count == 1:  # stopped after the last step
            return
        began = time.monotonic()
        with (
            loader.stream(first, loader.n_steps, {entry.mixture for entry in entries}) as stream,
            workers(self._n_threads if loader.device.type == "cpu" else 1, loader.device) as pool,
            _stopped_at_ctrl_c(pool),
            profiling(self._profile, loader, stream, range(first, loader.n_steps), len(entries)) as begin_step,
        ):
            self._profile = None
            rows = next(stream, None)
            while rows is not None:
                if words := epoch_ended(loader.schedule, rows.step):
                    _log.info("%s", words)
                current = [entry for entry in entries if entry.run is not None and entry.run.n_done == rows.step]
                begin_step(rows.step, len(current))
                following = self._step(current, rows, pool, lambda: next(stream, None))
                for entry in current:
                    if entry.failure:
                        entry.fail()
                        others = any(other.run is not None for other in entries)
                        _log.warning("%s%s", failure_of(entry.facts), "; the other runs go on" if others else "")
                if all(entry.run is None for entry in entries):
                    return
                heed_signals()
                speed = (rows.step + 1 - first) * loader.data.batch_size / max(time.monotonic() - began, 1e-9)
                progress.advance(len(current), note=_note(entries, speed) if rows.step % _NOTE_EVERY == 0 else "")
                rows = following

    def _step(self, entries: list[Entry], rows: Rows, pool: Workers, read: Callable[[], Rows | None]) -> Rows | None:
        """One step of every run that is at this step, each on its own mix of the rows; gives the next rows."""
        loader, mixed = self._loader, {}
        with span(MIX):
            for mixture in {entry.mixture for entry in entries}:
                fraction, schedule, with_twin = mixture
                mixed[mixture] = rows.mix(fraction, loader.data.target, schedule=schedule, with_twin=with_twin)

        def step(entry: Entry) -> None:
            with span(SAE_STEP):
                entry.step(mixed[entry.mixture], loader, self._checkpoint_every)

        def wait() -> Rows | None:
            with span(WAIT):
                return read()

        todo = [(entry, threads_of(entry.config, loader, self._n_threads)) for entry in entries]
        if self._team.spread.size > 1:  # one after another, in the same order everywhere: they send each other messages
            todo = [(entry, max(2, self._n_threads)) for entry in entries]
        return pool.run(step, todo, meanwhile=wait)


@contextmanager
def _stopped_at_ctrl_c(pool: Workers) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        pool.stop()  # a step that is half done is no state to keep
        raise


@contextmanager
def _kept_at_ctrl_c(entries: list[Entry]) -> Iterator[None]:
    """At Ctrl-C write a checkpoint of every unfinished run, and say how to go on. A second Ctrl-C stops at once."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if any(entry.spread.size > 1 for entry in entries) and not isinstance(interrupt, StoppedTogether):
            raise  # the others are not at this step, and a state is only whole with theirs
        unfinished = [entry for entry in entries if entry.is_waiting]
        for entry in unfinished:
            entry.keep()
        if not unfinished:
            raise
        step = led(entries[0].spread, lambda: min(checkpoint_step(entry.folder) for entry in unfinished))
        raise KeyboardInterrupt(f"add --resume to go on from step {step:,}") from interrupt


@contextmanager
def _kept_at_damage(entries: list[Entry]) -> Iterator[None]:
    """A file of the cache that only now proves damaged, or does not come: keep every step so far."""
    try:
        yield
    except (CacheDamaged, StoreError, RoomTooSmall) as error:
        for entry in entries:
            if entry.spread.size == 1:  # the others that train it may not have met the damage yet
                entry.keep()
        raise Unfinished(f"{error}; then {GO_ON}") from None
    except JobEnded:  # another rank is gone
        for entry in entries:
            if entry.spread.size == 1:
                entry.keep()
        raise


@contextmanager
def _closed(entries: list[Entry]) -> Iterator[None]:
    """In the end no run of the pass holds memory or an open log."""
    try:
        yield
    finally:
        for entry in entries:
            entry.run = None
            entry.close_tracker()


@contextmanager
def _memory_as_sentence() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Unfinished(
            f"the device ran out of memory ({str(error).splitlines()[0]}); {GO_ON} and a lower --memory, "
            "which trains fewer SAEs at a time"
        ) from None


def _note(entries: list[Entry], speed: float) -> str:
    """`81,920 tokens/s, loss 0.1534, explained 0.846, L0 20.1, 12 dead`: means over the runs' last log lines."""
    lines = [entry.latest for entry in entries if entry.latest and entry.run is not None]
    if not lines:
        return f"{speed:,.0f} tokens/s"
    loss, l0, n_dead = (sum(line[key] for line in lines) / len(lines) for key in ("loss", "l0", "n_dead"))
    explained = [line["explained_variance"] for line in lines if line["explained_variance"] is not None]
    seen = f", explained {sum(explained) / len(explained):.3f}" if explained else ""
    return f"{speed:,.0f} tokens/s, loss {loss:.4g}{seen}, L0 {l0:.1f}, {n_dead:.0f} dead"
