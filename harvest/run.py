"""The harvest: plan or resume, then make this process' missing shards, then close the cache if it is whole."""

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache_spec.errors import CacheConflict, UserError
from cache_spec.layout import PLAN, ROOT, archive_level, record_file
from cache_spec.plan import Plan
from cache_spec.progress import Progress
from cache_spec.state import committed_shards, read_plan, read_root, recorded_shards
from cache_spec.store_path import Place
from harvest.claims import TIMEOUT, Claims
from harvest.forecast import Forecast, forecast, forecast_facts, print_forecast, refuse_if_full, size
from harvest.model import LoadedModel
from harvest.pilot import model_speed
from harvest.pipeline import Job, batches_of, make_shards, writer_threads
from harvest.planning import differences, make_plan, outline
from harvest.prefix import saved_share
from harvest.reader import Reader, open_reader
from harvest.request import Request
from harvest.shard import prepare_shard
from harvest.share import Share
from harvest.stopping import Stop, catch_stops
from harvest.target import Target, open_target
from harvest.text import check_dataset
from harvest.turns import Turns
from harvest.windows import Windows, open_windows, save_windows

# Over all variants. Measured on the tiny model: a CPU is fastest while one batch stays in its caches.
_TOKENS_AT_ONCE_CPU, _TOKENS_AT_ONCE_GPU = 4096, 32768
_DRY_RUN = "dry run: the text was not read, and nothing was written"


def harvest(
    loaded: LoadedModel,
    request: Request,
    out: str | Path,
    *,
    scratch: Path | None = None,
    share: Share = Share(),
    batch_windows: int = 0,
    compile: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    claim_timeout: float = TIMEOUT,
) -> None:
    """Write this process' share of the cache at `out`, or go on with it; with `dry_run` say what it takes, no more.
    Shards that others leave undone are made too, an owner being dead that does nothing for `claim_timeout` seconds.

    `out` is a folder or the URL of an object store; for the latter, shards are built in `scratch`, by default a folder
    among the system's temporary ones.

    `batch_windows` is how many windows run at once, each in all variants; 0 chooses. Ctrl-C finishes the shard in
    progress, a second one stops at once; both raise KeyboardInterrupt with how to go on.

    Raises CacheConflict if `out` holds another plan or something else, DiskFull if the disk is or would be full, and
    UserError for text or a model that cannot give this cache.
    """
    if batch_windows < 0:
        raise UserError(f"--batch-windows is {batch_windows}; give a number of windows, or 0 to have one chosen")
    with open_target(out, scratch) as target:
        _harvest(loaded, request, target, share, claim_timeout, batch_windows, compile, dry_run, as_json)


def _harvest(
    loaded: LoadedModel,
    request: Request,
    target: Target,
    share: Share,
    claim_timeout: float,
    batch_windows: int,
    compile: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    out = target.place
    plan = _planned_before(loaded, request, target) or outline(loaded, request)
    if loaded.device.type == "meta":
        assert dry_run, "a model without weights can only be planned for"
        ahead = forecast(plan, out, _missing(plan, out), share, None, scratch=target.scratch)
        _say_dry(plan, out, ahead, share, loaded.device, as_json)
        return
    with catch_stops() as stop, open_reader(loaded, request.hook_points, compile=compile) as reader:
        batch_windows = choose_batch_windows(plan, reader.device, batch_windows)
        missing = _missing(plan, out)
        speed = model_speed(reader, plan, batch_windows) if any(map(share.owns, missing)) else None
        ahead = forecast(plan, out, missing, share, speed, scratch=target.scratch)
        if dry_run:
            _say_dry(plan, out, ahead, share, reader.device, as_json)
            return
        print_forecast(plan, out, ahead, share, reader.device)
        refuse_if_full(out, ahead)
        plan, windows = _planned(loaded, reader, request, target)
        job = Job(
            plan=plan,
            windows=windows,
            tokenizer=loaded.tokenizer,
            reader=reader,
            batch_windows=batch_windows,
            pad=compile or reader.device.type == "cuda",
        )
        with Claims(target.board(), share, claim_timeout) as claims:
            there, is_there = recorded_shards(out), lambda shard: (out / record_file(shard)).is_file()
            _write_shards(job, target, Turns(plan, share, claims, there, is_there), claims, stop)
    _close(plan, target)


def _say_dry(plan: Plan, out: Place, ahead: Forecast, share: Share, device: torch.device, as_json: bool) -> None:
    if as_json:
        print(json.dumps(forecast_facts(plan, out, ahead, share, device)))
        return
    print_forecast(plan, out, ahead, share, device)
    print(_DRY_RUN)


def _planned_before(loaded: LoadedModel, request: Request, target: Target) -> Plan | None:
    """The plan of an earlier run of the same command, or of another process, if there is one."""
    out = target.place
    if not (out / PLAN).is_file():
        target.refuse_foreign()
        check_dataset(request.dataset)
        return None
    plan = read_plan(out)
    if (out / ROOT).exists() and archive_level(read_root(out)):  # one that was deleted is made again
        raise CacheConflict(
            f"{out} is a compressed archive; `python -m cache_spec transcode {out} NEW_FOLDER` makes a cache of it "
            "that a harvest can go on with, or choose another --out"
        )
    if unlike := differences(plan, loaded, request):
        raise CacheConflict(
            f"{out} holds a cache of another plan ({'; '.join(unlike)}); "
            "give the same options to go on with it, or choose another --out"
        )
    return plan


def _missing(plan: Plan, out: Place) -> list[int]:
    """The shards of all processes that are not committed."""
    done = committed_shards(out, plan) if (out / PLAN).is_file() else ()
    return [shard for shard in range(plan.n_shards) if shard not in done]


def _planned(loaded: LoadedModel, reader: Reader, request: Request, target: Target) -> tuple[Plan, Windows]:
    """The plan and its windows, made now unless they are there. Of several processes one plans and the others wait."""
    if not (target.place / PLAN).is_file():
        with target.planning():
            # Another process may have planned by now; a plan appears only after the windows it needs.
            if _planned_before(loaded, request, target) is None:
                plan, windows = make_plan(loaded, reader, request)
                save_windows(target.folder, windows)
                target.create(plan)
    plan = _planned_before(loaded, request, target)
    assert plan is not None, "the plan vanished"
    target.prepare(plan)
    return plan, open_windows(target.folder, plan)


def choose_batch_windows(plan: Plan, device: torch.device, most: int = 0) -> int:
    """How many windows run at once: at most `most`, or what suits the device if that is 0.

    A shard falls into equal batches, so that none is short, or padded to full size.
    """
    n_tokens = _TOKENS_AT_ONCE_CPU if device.type == "cpu" else _TOKENS_AT_ONCE_GPU
    most = most or max(1, n_tokens // (plan.window_tokens * len(plan.variants)))
    rows, window = plan.shard_rows, plan.window_tokens
    # A shard that does not begin with a window touches one more.
    n_windows = rows // window if rows % window == 0 else (rows + 2 * window - 2) // window
    n_batches = -(-n_windows // most)
    return -(-n_windows // n_batches)


def _write_shards(job: Job, target: Target, turns: Turns, claims: Claims, stop: Stop) -> None:
    """Make and commit the shards. Raises KeyboardInterrupt, with how to go on, if someone asked to stop."""
    plan, out, start = job.plan, target.place, time.monotonic()
    n_tokens, n_whole, n_variants = 0, turns.n_rows_ahead() * len(plan.variants), len(plan.variants)
    n_threads, said = writer_threads(job.reader.device, os.environ), False

    def numbers() -> Iterator[int]:
        nonlocal n_whole, said
        while not stop.asked and (shard := turns.next()) is not None:
            if not said:
                _say_if_reused(job, shard)
            said, n_whole = True, turns.n_rows_ahead() * n_variants
            progress.expect(n_whole)
            stop.finish(f"shard {shard}")
            yield shard

    def write(shard: int, arrays: dict[tuple[str, str], np.ndarray], columns: dict[str, np.ndarray]) -> None:
        target.write(plan, shard, arrays, columns, n_threads)
        claims.give_back(shard)

    def advance(n: int) -> None:
        nonlocal n_tokens
        n_tokens += n
        seconds_left = (time.monotonic() - start) / n_tokens * (n_whole - n_tokens)
        progress.advance(n, _note(job.reader.device, seconds_left))

    try:
        with Progress("harvest", n_whole, "tokens") as progress:
            more = True
            while more:
                make_shards(job, numbers(), write, advance)
                stop.finish("")  # whoever waits stops at once
                more = not stop.asked and turns.wait(partial(print, flush=True))
        if stop.asked and turns.left():
            raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        there = f"{len(recorded_shards(out))} of {plan.n_shards} shards are in {out}"
        left = turns.left()
        then = f"goes on from shard {left[0]}" if left else "closes the cache"
        raise KeyboardInterrupt(f"{there}; the same command {then}") from interrupt
    seconds = time.monotonic() - start
    if n_tokens:
        variants = f"{n_tokens // n_variants:,} tokens in {n_variants} variants"
        print(f"{variants} in {seconds:,.1f} s ({n_tokens / seconds:,.0f} tokens/s in all)")


def _say_if_reused(job: Job, number: int) -> None:
    """Say how much the reuse of beginnings saves, if it is worth it for the first shard; the others are alike."""
    shard = prepare_shard(job.plan, job.windows, job.tokenizer, number)
    if saved := saved_share(batches_of(job, shard), shard.first, job.plan.window_tokens):
        print(f"prefix reuse: saves {saved:.0%} of the tokens", flush=True)


def _note(device: torch.device, seconds_left: float) -> str:
    end = time.localtime(time.time() + seconds_left)
    note = f"ends about {time.strftime('%a %H:%M', end)}"
    if device.type != "cuda":
        return note
    used, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return f"GPU memory {size(used)} of {size(whole)}, {note}"


def _close(plan: Plan, target: Target) -> None:
    """Close the cache if all shards are there; else whoever commits the last one will."""
    out = target.place
    n_there = len(committed_shards(out, plan))
    if n_there < plan.n_shards:
        print(f"{n_there} of {plan.n_shards} shards are in {out}; the other processes make the rest")
        return
    target.close(plan)
    print(f"complete: {plan.n_rows:,} rows in {plan.n_shards} shards at {out}")
