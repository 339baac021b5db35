"""What the command prints: the plan before it starts, a small table when it is done."""

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.known import numbers_in
from train.loader import MixedBatchLoader
from train.parallel.axis import ALONE, Spread
from train.passes import n_parameters, needed_bytes, passes_sentence, split
from train.run_folder import FAILED
from train.scale import recipe_label
from train.schedule import epochs_ahead
from train.timetable import FULL_WINDOW

_MANY_DEAD, _FAR_FROM_K, _FAR_FROM_AIM = 0.1, 0.1, 0.5  # shares from which a result is worth a note


def print_preset(name: str, settings: dict[str, Any]) -> None:
    """What a preset set, option by option; nothing without one."""
    if name:
        words = (
            f"--{key.replace('_', '-')} {','.join(value) if isinstance(value, list) else value}"
            for key, value in settings.items()
        )
        print(f"preset    {name}: {' '.join(words) or 'everything in it was given'}")


def print_plan(
    loader: MixedBatchLoader,
    shares: Sequence[Sequence[RunConfig]],
    n_threads: int,
    free: int | None,
    kernel: str,
    spread: Spread = ALONE,
) -> None:
    """The rows, the schedule, the memory and the passes, and each run. Raises UserError if one does not fit.

    `shares` are the runs of each rank; the memory is that of the rank that needs most.
    """
    runs = [run for share in shares for run in share]
    data, scale = loader.data, loader.scale
    plan = loader.cache.plan
    epochs = loader.n_steps * data.batch_size / loader.n_rows
    to = f" -> {loader.target_hook.name}" if data.target_hook else ""
    print(
        f"cache     {loader.cache.place}: {loader.hook.name}{to} of {plan.model.get('id', 'unknown')}, "
        f"{loader.n_rows:,} rows to train on, d_model {loader.hook.d_model}"
    )
    print(f"reading   {loader.io_note}")
    print(
        f"data      {data.n_tokens:,} tokens: {loader.n_steps:,} steps of {data.batch_size:,}, {epochs:.2f} epochs; "
        f"positions {data.positions}, target {data.target}, data seed {data.seed}"
    )
    if words := epochs_ahead(loader.n_rows, loader.n_steps * data.batch_size):
        print(f"epochs    {words}")
    moved = "" if scale.displacement is None else f"; a masked row moves by {scale.displacement:.1%} of that, in square"
    print(f"scale     rows are {scale.norm_factor:.4g} long (root mean square){moved}")
    _print_schedule(runs[0], loader.n_steps)
    needed, passes = _of_the_fullest(loader, shares, n_threads, free, kernel, spread)
    print(f"memory    {passes_sentence(passes, needed, free)} (on {loader.device})")
    if len(shares) > 1:
        *most, last = (str(len(share)) for share in shares)
        print(
            f"ranks     {len(shares)}, which train {', '.join(most)} and {last} SAEs; the memory is that of the fullest"
        )
    if spread.size > 1:
        print(f"spread    each SAE's {spread}; the memory is that of one")
    print(f"runs      {len(runs)}")
    width = max(len(run.name) for run in runs)
    for run in runs:
        n = n_parameters(run, loader.hook.d_model, loader.d_out)
        print(f"  {run.name:<{width}}  {n:>12,} parameters  {recipe_label(run, data)}")
    sys.stdout.flush()  # before the progress, which goes another way


def plan_facts(
    loader: MixedBatchLoader,
    shares: Sequence[Sequence[RunConfig]],
    n_threads: int,
    free: int | None,
    kernel: str,
    parallel: str = "",
    spread: Spread = ALONE,
) -> dict[str, Any]:
    """The same for programs: what `--dry-run --json` prints. docs/shell.md has the keys. Raises as print_plan does.

    `parallel` as a team has it.
    """
    data, runs = loader.data, [run for share in shares for run in share]
    needed, passes = _of_the_fullest(loader, shares, n_threads, free, kernel, spread)
    return {
        "cache": loader.cache.place,
        "hook": data.hook,
        "target_hook": data.target_hook,
        "d_model": loader.hook.d_model,
        "rows": loader.n_rows,
        "tokens": data.n_tokens,
        "batch_size": data.batch_size,
        "steps": loader.n_steps,
        "epochs": loader.n_steps * data.batch_size / loader.n_rows,
        "memory": {"needed": needed, "free": free, "passes": len(passes)},
        "device": str(loader.device),
        "parallel": parallel,
        "ranks": [[run.name for run in share] for share in shares] * spread.size,
        "runs": [
            {
                "name": run.name,
                "parameters": n_parameters(run, loader.hook.d_model, loader.d_out),
                "recipe": recipe_label(run, data),
            }
            for run in runs
        ],
    }


def _of_the_fullest(
    loader: MixedBatchLoader,
    shares: Sequence[Sequence[RunConfig]],
    n_threads: int,
    free: int | None,
    kernel: str,
    spread: Spread,
) -> tuple[int, list[list[RunConfig]]]:
    """The bytes and the passes of the rank that needs most. Raises UserError if one run does not fit."""
    needs = [needed_bytes(share, loader, n_threads, kernel, spread) for share in shares]
    largest = shares[needs.index(max(needs))]
    return max(needs), split(largest, loader, n_threads, free, kernel, spread)


def _print_schedule(run: RunConfig, n_steps: int) -> None:
    short = f" (defaults scaled to a run below {20 * FULL_WINDOW:,} steps)" if n_steps < 20 * FULL_WINDOW else ""
    print(
        f"schedule  warm-up {run.warmup_steps}, sparsity warm-up {run.sparsity_warmup_steps}, decay from "
        f"{run.decay_start:,}, threshold from {run.threshold_start} with beta {run.threshold_beta:.4g}, dead after "
        f"{run.dead_tokens:,} tokens{short}"
    )


def print_results(facts: Sequence[dict[str, Any]], out: Path) -> None:
    """One line a run: L0 and explained variance on clean held-out rows, latents that died; where one failed."""
    width = max(len(fact["name"]) for fact in facts)
    print(f"\n{'run':<{width}}  {'L0':>7}  {'explained':>9}  {'dead':>6}  folder")
    for fact in facts:
        if fact["status"] == FAILED:
            where = f"failed at step {numbers_in(fact, 'failure').get('step', 0):,}"
            print(f"{fact['name']:<{width}}  {where:>26}  {out / fact['name']}")
            continue
        seen = numbers_in(fact, "held_out")
        l0, explained = seen.get("l0"), seen.get("explained_variance")
        print(
            f"{fact['name']:<{width}}  {'-' if l0 is None else f'{l0:.2f}':>7}  "
            f"{'-' if explained is None else f'{explained:.4f}':>9}  {seen.get('n_dead', '-'):>6}  {out / fact['name']}"
        )
    for note in notes(facts):
        print(f"note: {note}")


def notes(facts: Sequence[dict[str, Any]]) -> list[str]:
    """What in the results a person should look at, one sentence each."""
    found = []
    for fact in facts:
        seen, d_sae = numbers_in(fact, "held_out"), fact["config"]["d_sae"]
        n_dead = seen.get("n_dead", 0)
        if n_dead > _MANY_DEAD * d_sae:
            found.append(
                f"{fact['name']}: {n_dead:,} of {d_sae:,} latents are dead; train on more tokens, lower --dead-tokens "
                "so that auxk sets in earlier, or take a smaller --d-sae"
            )
        if seen.get("explained_variance", 0) < 0:
            found.append(
                f"{fact['name']}: it reconstructs worse than the mean row would, so it diverged; train it with a "
                "lower --lr into another --out"
            )
        aim, l0 = fact["config"]["k"], seen.get("l0")
        if fact["config"].get("arch") == "jumprelu" and l0 is not None and abs(l0 - aim) > _FAR_FROM_AIM * aim:
            found.append(
                f"{fact['name']}: L0 is {l0:.1f} on clean rows and {aim} was aimed at; train on more tokens, or give "
                "--penalty l0 a larger coefficient"
            )
        k = fact["config"]["k"]
        before = numbers_in(fact, "calibration").get("clean_l0_at_training_threshold", k)
        if abs(before - k) > _FAR_FROM_K * k:
            found.append(
                f"{fact['name']}: the threshold averaged in training gave L0 {before:.1f} on clean rows; it was "
                f"calibrated to {k}"
            )
    return found


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors; else it goes back to the system and returns page by page.

    Worth a tenth of the time of a step, small or large. Elsewhere than on Linux with glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    try:
        set_option = library.mallopt
    except AttributeError:  # another C library
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    set_option(mmap_threshold, 32 << 20)
    set_option(trim_threshold, 1 << 30)
    set_option(mmap_max, 0)  # tensors above 32 MiB, where glibc caps the threshold, come from the heap too
