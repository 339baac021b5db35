"""The harvest: plan or resume, then make every missing shard, then close the cache."""

import shutil
import time
from pathlib import Path

from cache_spec.commit import write_shard
from cache_spec.create import create_cache, finalize_cache
from cache_spec.errors import CacheConflict, DiskFull, UserError
from cache_spec.layout import INTERNAL, PLAN, cache_bytes, shard_files
from cache_spec.plan import Plan
from cache_spec.progress import Progress
from cache_spec.state import committed_shards, is_ours, read_plan
from harvest.model import LoadedModel
from harvest.planning import differences, make_plan, outline
from harvest.request import Request
from harvest.shard import Job, make_shard
from harvest.windows import open_windows, save_windows

# Over all variants. Measured on the tiny model: a CPU is fastest while one batch stays in its caches.
_TOKENS_AT_ONCE_CPU, _TOKENS_AT_ONCE_GPU = 4096, 32768


def harvest(loaded: LoadedModel, request: Request, out: Path, *, batch_windows: int = 0, dry_run: bool = False) -> None:
    """Write the cache at `out`, or go on with it; with `dry_run` say what would be written, and write nothing.

    `batch_windows` is how many windows run at once, each in all variants; 0 chooses.
    Raises CacheConflict if `out` holds another plan or something else, DiskFull if the disk is or would be full, and
    UserError for text or a model that cannot give this cache.
    """
    if batch_windows < 0:
        raise UserError(f"--batch-windows is {batch_windows}; give a number of windows, or 0 to have one chosen")
    plan = _planned_before(loaded, request, out)
    missing, needed, free = _describe(plan or outline(loaded, request), out)
    if dry_run:
        print("dry run: the text was not read, and nothing was written")
        return
    if needed > free:
        raise DiskFull(
            f"{out} needs {_size(needed)} more and the disk has {_size(free)} free; make room, or harvest fewer "
            "--tokens or --layers"
        )
    if plan is None:
        plan, windows = make_plan(loaded, request)
        save_windows(out, windows)
    else:
        windows = open_windows(out, plan)
    create_cache(out, plan)
    at_once = _TOKENS_AT_ONCE_CPU if loaded.device.type == "cpu" else _TOKENS_AT_ONCE_GPU
    batch_windows = batch_windows or max(1, at_once // (plan.window_tokens * len(plan.variants)))
    job = Job(plan=plan, windows=windows, loaded=loaded, batch_windows=batch_windows)
    _write_missing(job, out, missing)
    finalize_cache(out)
    print(f"complete: {plan.n_rows:,} rows in {plan.n_shards} shards at {out}")


def _planned_before(loaded: LoadedModel, request: Request, out: Path) -> Plan | None:
    """The plan of an earlier run of the same command, if there was one."""
    if not (out / PLAN).exists():
        _refuse_foreign(out)
        return None
    plan = read_plan(out)
    if unlike := differences(plan, loaded, request):
        raise CacheConflict(
            f"{out} holds a cache of another plan ({'; '.join(unlike)}); "
            "give the same options to go on with it, or choose another --out"
        )
    return plan


def _refuse_foreign(out: Path) -> None:
    """Before the text is read, which can take minutes; `create_cache` looks more closely later."""
    if out.exists() and not out.is_dir():
        raise CacheConflict(f"{out} is a file; give a folder that is new or empty with --out")
    if (above := next((folder for folder in out.parents if folder.exists()), None)) and not above.is_dir():
        raise CacheConflict(f"{above} is a file, so there can be no {out}; give another folder with --out")
    if not out.exists() or is_ours(out):
        return
    if foreign := sorted(entry.name for entry in out.iterdir() if entry.name != INTERNAL):
        raise CacheConflict(
            f"{out} is no activation cache and is not empty (it holds '{foreign[0]}'); give a new or empty folder"
        )


def _write_missing(job: Job, out: Path, missing: list[int]) -> None:
    plan, n_before, start = job.plan, job.plan.n_shards - len(missing), time.monotonic()
    n_rows = sum(plan.rows_in(shard) for shard in missing)
    n_done = 0
    try:
        with Progress("harvest", n_rows, "tokens") as progress:
            for shard in missing:
                arrays, columns = make_shard(job, shard, progress)
                write_shard(out, plan, shard, arrays, columns)
                n_done += 1
    except KeyboardInterrupt as interrupt:
        there = f"{n_before + n_done} of {plan.n_shards} shards are in {out}"
        then = f"goes on from shard {missing[n_done]}" if n_done < len(missing) else "closes the cache"
        raise KeyboardInterrupt(f"{there}; the same command {then}") from interrupt
    seconds = time.monotonic() - start
    if missing:
        rate = n_rows * len(plan.variants) / seconds
        print(f"{n_rows:,} tokens in {len(plan.variants)} variants in {seconds:,.1f} s ({rate:,.0f} tokens/s in all)")


def _describe(plan: Plan, out: Path) -> tuple[list[int], int, int]:
    """Print the plan and what is left to do; returns the missing shards, the bytes they need, and the bytes free."""
    done = committed_shards(out, plan) if (out / PLAN).exists() else ()
    missing = [shard for shard in range(plan.n_shards) if shard not in done]
    needed, free = _bytes_needed(plan, out, missing), _bytes_free(out)
    hooks = [
        f"{hook.hook_point} ({hook.hf_name}, {hook.d_model} wide, stored / {hook.scale_factor:g})"
        for hook in plan.hooks
    ]
    variants = [
        variant.name + (f" (p = {variant.mask_prob:g})" if variant.mask_prob else "") for variant in plan.variants
    ]
    n_documents = f"{plan.source['n_documents']:,} documents, " if "n_documents" in plan.source else ""
    print(f"model     {plan.model['id']} ({plan.model['family']}, {plan.model['dtype']})")
    print(f"layers    {', '.join(hooks)}")
    print(f"variants  {', '.join(variants)}")
    print(f"text      {plan.source['id']}: {n_documents}windows of {plan.window_tokens} tokens")
    print(
        f"rows      {plan.n_train_rows:,} to train on + {plan.n_rows - plan.n_train_rows:,} held out, of each variant"
    )
    print(f"shards    {plan.n_shards} of {plan.shard_rows:,} rows, {len(done)} of them there")
    print(f"disk      {_size(needed)} needed, {_size(free)} free, {_size(cache_bytes(plan))} when whole")
    print(f"cache     {out}", flush=True)
    return missing, needed, free


def _bytes_needed(plan: Plan, out: Path, missing: list[int]) -> int:
    shards = sum(sum(shard_files(plan, shard).values()) for shard in missing)
    windows = 2 * 4 * plan.window_tokens * (plan.n_train_windows + plan.n_held_out_windows)
    return shards + (0 if (out / PLAN).exists() else windows)


def _bytes_free(out: Path) -> int:
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _size(n_bytes: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} kB"
