"""What a harvest will take, said before it starts: rows, shards, bytes and time; and no to what cannot fit."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_spec.errors import DiskFull, UserError
from cache_spec.layout import PLAN, cache_bytes, shard_files
from cache_spec.plan import HookPlan, Plan, VariantPlan
from cache_spec.store_path import Place, StorePath
from harvest.share import Share

_WINDOW_BYTES = 2 * 4  # a token's id and its document, 4 bytes each, in the planner's two files and in its memory
_SHARDS_IN_FLIGHT = 2  # one is made while the one before it is written


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is left to do. Bytes are those of all processes, who share the disk; the rest is this process' own.

    Where the cache goes to a store, the disk is that of the scratch folder.
    """

    n_missing: int  # shards, of all processes
    n_own: int  # of these, the shards of this process
    n_rows: int  # in them, of each variant
    bytes_needed: int
    bytes_on_disk: int  # of these, what the disk has to hold at once: for a store, a shard and the windows
    bytes_free: int
    bytes_memory: int  # what this process will hold: shards in flight, and the windows while they are cut
    tokens_per_s: float | None  # the model's measured speed, all variants counted; None: not measured
    seconds: float | None


def forecast(
    plan: Plan,
    out: Place,
    missing: Sequence[int],
    share: Share,
    tokens_per_s: float | None,
    *,
    scratch: Path | None = None,
) -> Forecast:
    """What making the shards `missing` takes: the bytes of all of them, the rows and seconds of those in `share`.
    If `out` is in a store, they are built in `scratch`.

    The time is that of the model alone; benchmarks.harvest measures how little the rest adds.
    """
    own = [shard for shard in missing if share.owns(shard)]
    n_rows = sum(plan.rows_in(shard) for shard in own)
    all_windows = _WINDOW_BYTES * plan.window_tokens * (plan.n_train_windows + plan.n_held_out_windows)
    windows = 0 if (out / PLAN).is_file() else all_windows
    needed = _bytes_of(plan, missing) + windows
    row_bytes = 2 * len(plan.variants) * sum(hook.d_model for hook in plan.hooks)
    return Forecast(
        n_missing=len(missing),
        n_own=len(own),
        n_rows=n_rows,
        bytes_needed=needed,
        bytes_on_disk=_bytes_of(plan, own[:1]) + (all_windows if own else 0) if scratch else needed,
        bytes_free=_bytes_free(scratch or Path(str(out))),
        bytes_memory=_SHARDS_IN_FLIGHT * min(plan.shard_rows, plan.n_rows) * row_bytes + windows,
        tokens_per_s=tokens_per_s,
        seconds=n_rows * len(plan.variants) / tokens_per_s if tokens_per_s else None,
    )


def print_forecast(plan: Plan, out: Place, ahead: Forecast, share: Share, device: object) -> None:
    """Print the plan and what is left to do of it; `device` is where the speed was measured."""
    n_held_out = plan.n_rows - plan.n_train_rows
    lines = [
        ("model", f"{plan.model['id']} ({', '.join(_model_notes(plan))})"),
        ("layers", ", ".join(map(_hook, plan.hooks))),
        ("variants", ", ".join(map(_variant, plan.variants))),
        ("text", f"{_text(plan)}, in windows of {plan.window_tokens} tokens"),
        ("rows", f"{plan.n_train_rows:,} to train on + {n_held_out:,} held out, of each variant"),
        ("shards", _shards(plan, ahead, share)),
        ("disk", _disk(plan, ahead)),
        ("time", _time(ahead, share, device)),
        ("cache", str(out)),
    ]
    print("\n".join(f"{name:<10}{text}" for name, text in lines), flush=True)


def forecast_facts(plan: Plan, out: Place, ahead: Forecast, share: Share, device: object) -> dict[str, Any]:
    """The same for programs: what `--dry-run --json` prints. docs/shell.md has the keys."""
    return {
        "out": str(out),
        "model": plan.model,
        "source": plan.source,
        "hooks": [{"hook_point": hook.hook_point, "d_model": hook.d_model} for hook in plan.hooks],
        "variants": [asdict(variant) for variant in plan.variants],
        "rows": {"train": plan.n_train_rows, "held_out": plan.n_rows - plan.n_train_rows},
        "shards": {"planned": plan.n_shards, "missing": ahead.n_missing, "own": ahead.n_own, "rows": plan.shard_rows},
        "bytes": {
            "needed": ahead.bytes_needed,
            "on_disk": ahead.bytes_on_disk,
            "free": ahead.bytes_free,
            "whole": cache_bytes(plan),
        },
        "memory": ahead.bytes_memory,
        "share": f"{share.index}/{share.count}",
        "device": str(device),
        "tokens_per_s": ahead.tokens_per_s,
        "seconds": ahead.seconds,
    }


def refuse_if_full(out: Place, ahead: Forecast) -> None:
    """Raises DiskFull if the missing shards will not fit on the disk, UserError if two shards and the windows are
    more than all the memory of the machine."""
    lacking = ahead.bytes_on_disk - ahead.bytes_free
    if lacking > 0 and isinstance(out, StorePath):
        raise DiskFull(
            f"{out} needs {size(ahead.bytes_on_disk)} on this disk while a shard is built and {size(ahead.bytes_free)} "
            "are free; make room, or give a folder on another disk with --scratch"
        )
    if lacking > 0:
        raise DiskFull(
            f"{out} needs {size(ahead.bytes_needed)} more and the disk has {size(ahead.bytes_free)} free, so "
            f"{size(lacking)} are missing; make room, choose an --out on another disk, or ask for fewer --tokens, "
            "--layers or variants (--mask-prob, --random-prob)"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if ahead.bytes_memory > memory:
        raise UserError(
            f"this harvest holds {size(ahead.bytes_memory)} in memory (two shards, and the text while it is cut) and "
            f"the machine has {size(memory)}; ask for fewer --tokens, --layers or variants"
        )


def size(n_bytes: int) -> str:
    """Bytes in a decimal unit with three significant digits: 1.52 GB; from a tenth of a terabyte on, in TB."""
    units = (("TB", 10**12, 10**11), ("GB", 10**9, 10**9), ("MB", 10**6, 10**6), ("kB", 10**3, 10**3))
    # Half of the last digit below, so that 999.6 MB is 1.00 GB and not 1,000 MB.
    unit, factor = next(((unit, factor) for unit, factor, least in units if n_bytes >= 0.9995 * least), ("", 0))
    return f"{_three_digits(n_bytes / factor)} {unit}" if factor else f"{n_bytes} bytes"


def duration(seconds: float) -> str:
    """A time in its two largest units: 45 s, 3 h 20 min, 2 days 4 h."""
    for unit, below, factor in (("days", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if seconds >= factor - 0.5:
            per = {"h": 3600, "min": 60, "s": 1}[below]
            whole, left = divmod(round(seconds / per), factor // per)
            return f"{whole:,} {'day' if unit == 'days' and whole == 1 else unit} {left} {below}"
    return f"{seconds:.0f} s" if seconds >= 1 or seconds == 0 else "less than 1 s"


def _bytes_of(plan: Plan, shards: Sequence[int]) -> int:
    """All shards have the size of the first, but the last, which may be short."""
    first, last = (sum(shard_files(plan, shard).values()) for shard in (0, plan.n_shards - 1))
    n_last = int(plan.n_shards - 1 in shards)
    return (len(shards) - n_last) * first + n_last * last


def _bytes_free(out: Path) -> int:
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _three_digits(number: float) -> str:
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    rounded = round(number, digits)
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(rounded)))}f}" if rounded else "0"


def _model_notes(plan: Plan) -> list[str]:
    revision = str(plan.model.get("revision", ""))
    return [plan.model["family"], plan.model["dtype"], *([f"revision {revision[:19]}"] if revision else [])]


def _hook(hook: HookPlan) -> str:
    # A scale of 1 goes without saying, and before the pilot it is not known.
    scale = f", stored / {hook.scale_factor:g}" if hook.scale_factor != 1 else ""
    return f"{hook.hook_point} ({hook.hf_name}, {hook.d_model} wide{scale})"


def _variant(variant: VariantPlan) -> str:
    unit = ", whole words" if variant.kind == "mask_word" else ""
    by = "random tokens" if variant.kind == "random" else repr(variant.mask_string)
    return variant.name + ("" if variant.kind == "clean" else f" (p = {variant.mask_prob:g}{unit}) by {by}")


def _text(plan: Plan) -> str:
    source = plan.source
    revision = f" at revision {source['revision'][:12]}" if source.get("revision") else ""
    n_documents = f", {source['n_documents']:,} documents" if "n_documents" in source else ""
    return f"{source['id']}{revision}{n_documents}"


def _shards(plan: Plan, ahead: Forecast, share: Share) -> str:
    n_there = plan.n_shards - ahead.n_missing
    whole = f"{plan.n_shards:,} of {plan.shard_rows:,} rows: {n_there:,} there, {ahead.n_missing:,} missing"
    if share.count == 1:
        return whole
    makes = "begins with" if share.helps else "makes"
    return f"{whole}; this process is {share.index}/{share.count} ({share.source}) and {makes} {ahead.n_own:,} of them"


def _disk(plan: Plan, ahead: Forecast) -> str:
    lacking = ahead.bytes_on_disk - ahead.bytes_free
    free = f"{size(ahead.bytes_free)} free" + (f" ({size(lacking)} are missing)" if lacking > 0 else "")
    if ahead.bytes_on_disk != ahead.bytes_needed:
        put = f"{size(ahead.bytes_needed)} to put into the store, {size(cache_bytes(plan))} when whole"
        return f"{put}; {size(ahead.bytes_on_disk)} needed here, {free}"
    return f"{size(ahead.bytes_needed)} needed, {free}, {size(cache_bytes(plan))} when whole"


def _time(ahead: Forecast, share: Share, device: object) -> str:
    if not ahead.n_own:
        return "nothing left to do" + ("" if share.count == 1 else " for this process")
    if ahead.seconds is None or ahead.tokens_per_s is None:
        return "not known, the speed was not measured"
    return f"expected time {duration(ahead.seconds)} at {_three_digits(ahead.tokens_per_s)} tokens/s on {device}"
