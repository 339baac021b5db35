"""Before a sweep: what every run's folder holds, whose turn it is, and which rank trains what."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cache_spec.errors import UserError
from train.checkpoint import checkpoint_step, remove_checkpoints
from train.choosing import kernel_of
from train.config import RunConfig
from train.engine import Kernel
from train.entry import Entry
from train.facts import differing_facts, run_facts
from train.known import check_facts
from train.loader import MixedBatchLoader
from train.parallel.agree import led
from train.parallel.axis import ALONE, Spread
from train.passes import step_cost
from train.ranks import Team
from train.run_folder import (
    COMPLETE,
    FACTS,
    FAILED,
    GO_ON,
    TRAINING,
    check_out,
    failure_of,
    hold,
    holds_files,
    read_facts,
)

_log = logging.getLogger(__name__)


def prepare(
    loader: MixedBatchLoader,
    configs: Sequence[RunConfig],
    out: Path,
    kernels: Sequence[Kernel],
    resume: bool,
    spread: Spread = ALONE,
) -> list[Entry]:
    """Check every folder before the first is touched. Of ranks that train each run together one checks for all."""
    checked = led(spread, lambda: _checked_facts(loader, configs, out, kernels, resume))
    return [
        Entry(config=config, folder=out / config.name, facts=facts, kernel=kernel, spread=spread)
        for config, facts, kernel in zip(configs, checked, kernels, strict=True)
    ]


def _checked_facts(
    loader: MixedBatchLoader, configs: Sequence[RunConfig], out: Path, kernels: Sequence[Kernel], resume: bool
) -> list[dict[str, Any]]:
    """What the run.json of each run says, or will say."""
    check_out(out)
    checked = []
    for config, kernel in zip(configs, kernels, strict=True):
        folder = out / config.name
        facts, old = run_facts(config, loader, kernel), read_facts(folder)
        if old is not None:
            _check_same(folder, old, facts, resume)
            facts = old
        elif folder.exists() and (not folder.is_dir() or holds_files(folder)):
            raise UserError(f"{folder} is there and is no run; move it away or name another --out")
        checked.append(facts)
    return checked


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any], resume: bool) -> None:
    if differences := differing_facts(old, new):
        raise UserError(f"{folder} holds another run: {'; '.join(differences)}; name another --out")
    if not resume:
        state = {COMPLETE: "complete", FAILED: "failed"}.get(old["status"], "unfinished")
        then = {COMPLETE: "skip it", FAILED: "leave it as it is and train the others"}.get(
            old["status"], "go on with it"
        )
        raise UserError(f"{folder} holds this run already, {state}; add --resume to {then}, or name another --out")
    if old["status"] == TRAINING:
        check_facts(old, folder / FACTS)
    if old["status"] == FAILED:
        _log.warning("%s; it stays as it is, for the same recipe fails again at the same step", failure_of(old))


def hold_folder(entry: Entry, held: ExitStack) -> None:
    """Keep other processes out; one that was here a moment ago may have finished the run."""
    if entry.facts["status"] == COMPLETE:
        remove_checkpoints(entry.folder)  # a kill may have come before this
    if not entry.is_waiting:
        return
    held.enter_context(hold(entry.folder))
    entry.facts = read_facts(entry.folder) or entry.facts
    if entry.facts["status"] == COMPLETE:
        remove_checkpoints(entry.folder)


def hold_together(entry: Entry, held: ExitStack) -> None:
    """The same of a run that all ranks train: one holds the folder for all."""

    def facts() -> dict[str, Any]:
        hold_folder(entry, held)
        return entry.facts

    entry.facts = led(entry.spread, facts)


def spread(costs: Sequence[float], n_ranks: int) -> list[list[int]]:
    """Which of some things each rank does, by number and rising: the costliest first, each to whom has least to do."""
    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    loads = [0.0] * n_ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += costs[i]
    return [sorted(share) for share in shares]


def shares_of(configs: Sequence[RunConfig], loader: MixedBatchLoader, kernel: str, team: Team) -> list[list[RunConfig]]:
    """The runs of each rank when all of them are still to train, as share_of will have it, or those of all ranks.

    `kernel` is what was asked for.
    """
    if team.rank.count == 1 or team.spread.size > 1:
        return [list(configs)]
    costs = [step_cost(config, loader, kernel_of(config, loader, kernel).name) for config in configs]
    return [[configs[i] for i in share] for share in spread(costs, team.rank.count)]


def share_of(entries: Sequence[Entry], loader: MixedBatchLoader, team: Team) -> list[Entry]:
    """The waiting runs that this rank trains: each on one rank, by what is left of it, unless all train each run.
    All ranks call it.

    The first rank decides: on a network file system others may see a folder as it was.
    """
    waiting = [entry for entry in entries if entry.is_waiting]
    if team.rank.count == 1 or team.spread.size > 1:
        return waiting
    costs = [
        step_cost(entry.config, loader, entry.kernel.name) * max(1, loader.n_steps - checkpoint_step(entry.folder))
        for entry in waiting
    ]
    shares = [[waiting[i].config.name for i in share] for share in spread(costs, team.rank.count)]
    own = team.agree(shares)[team.rank.index]
    return [entry for entry in entries if entry.config.name in own]


def last_checkpoint(entries: Sequence[Entry]) -> str:
    """What is on the disk of the runs that are not finished, for whoever has to go on."""
    left = [entry for entry in entries if entry.is_waiting and _on_disk(entry) not in (COMPLETE, FAILED)]
    steps = sorted({checkpoint_step(entry.folder) for entry in left})
    if not steps:
        return f"every run was finished; {GO_ON} to see so"
    which = f" is step {steps[0]:,}" if len(steps) == 1 else f"s are of steps {steps[0]:,} to {steps[-1]:,}"
    kept = f"the last whole checkpoint{which}" if steps[-1] else "there is no checkpoint yet"
    return f"{kept}; {GO_ON}"


def _on_disk(entry: Entry) -> str | None:
    """The status of a run that may be in training on another rank."""
    return (read_facts(entry.folder) or {}).get("status")
