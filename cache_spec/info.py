"""What a cache holds, in lines for people and as JSON."""

import dataclasses
import re
import time
from typing import Any

from cache_spec.cache import ActivationCache
from cache_spec.layout import PLAN, activation_array, activation_file, cache_bytes, shard_files
from cache_spec.plan import HookPlan, Plan, VariantPlan
from cache_spec.state import stored_bytes
from cache_spec.untrusted import printable


def describe(cache: ActivationCache) -> str:
    """A summary of an opened cache: what made it, what is in it, how much of it is there, how to open it."""
    plan = cache.plan
    rows = [
        (
            "cache",
            ", ".join(filter(None, [plan.cache_id, cache.status, f"format {plan.spec_version}", _planned(cache)])),
        ),
        ("model", _facts(plan.model)),
        ("tokenizer", _facts(plan.tokenizer)),
        ("text", _facts(plan.source)),
        ("windows", _windows(plan)),
        *[("hook point" if i == 0 else "", _hook(cache, hook)) for i, hook in enumerate(plan.hooks)],
        *[("variant" if i == 0 else "", _variant(variant)) for i, variant in enumerate(plan.variants)],
        ("rows", f"{plan.n_train_rows:,} train + {plan.n_rows - plan.n_train_rows:,} held out, {plan.row_order}"),
        ("shards", f"{len(cache.shards)} of {plan.n_shards} committed, {plan.shard_rows:,} rows each"),
        ("size", _size(cache)),
        ("moments", _moments(cache)),
        *[("profile", f"archive: compressed, level {cache.attributes['level']}") for _ in range(cache.is_archive)],
        (
            "open with",
            f'{_opener(cache)}("{cache.place}"{"" if cache.status == "complete" else ", allow_partial=True"})',
        ),
    ]
    if not cache.files.is_remote:
        array = activation_array(plan.hooks[0].name, plan.variants[0].name)
        rows.append(("", f'or zarr.open("{cache.place}")["{array}"]'))
    return printable("\n".join([cache.place, *(f"  {name:<11}{text}" for name, text in rows)]))


def summary(cache: ActivationCache) -> dict[str, Any]:
    """The same for programs: what `info --json` prints. docs/shell.md has the keys."""
    plan = cache.plan
    return {
        "path": cache.place,
        "cache_id": plan.cache_id,
        "status": cache.status,
        "spec_version": plan.spec_version,
        "planned_at": _planned_at(cache),
        "model": plan.model,
        "tokenizer": plan.tokenizer,
        "source": plan.source,
        "windows": {"train": plan.n_train_windows, "held_out": plan.n_held_out_windows, "tokens": plan.window_tokens},
        "seed": plan.seed,
        "hooks": [dataclasses.asdict(hook) | {"largest": _largest(cache, hook)} for hook in plan.hooks],
        "variants": [dataclasses.asdict(variant) for variant in plan.variants],
        "rows": {"train": plan.n_train_rows, "held_out": plan.n_rows - plan.n_train_rows, "order": plan.row_order},
        "shards": {"committed": len(cache.shards), "planned": plan.n_shards, "rows": plan.shard_rows},
        "bytes": {"stored": _stored(cache), "planned": cache_bytes(plan)},
        "moment_rows": _moment_rows(cache),
        "archive_level": cache.attributes["level"] if cache.is_archive else None,
    }


def bytes_for_people(n_bytes: float) -> str:
    """A number of bytes in a decimal unit: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:,.0f} {unit}" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


def _facts(facts: dict[str, Any]) -> str:
    named = [f"{key} {_short(value)}" for key, value in facts.items() if key != "id" and value not in ("", None)]
    return ", ".join([str(facts.get("id", "unknown")), *named])


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{32,}", text) else text[:60]


def _windows(plan: Plan) -> str:
    counts = f"{plan.n_train_windows:,} train + {plan.n_held_out_windows:,} held out"
    return f"{counts}, each of {plan.window_tokens} tokens, seed {plan.seed}"


def _largest(cache: ActivationCache, hook: HookPlan) -> float | None:
    """The largest true value of any committed shard; None if there is none."""
    found = [
        cache.records[shard]["files"][activation_file(hook.name, variant.name, shard)]["absmax"] * hook.scale_factor
        for shard in cache.shards
        for variant in cache.plan.variants
    ]
    return max(found, default=None)


def _hook(cache: ActivationCache, hook: HookPlan) -> str:
    largest = _largest(cache, hook)
    size = f", largest value {largest:,.4g}" if largest is not None else ""
    return (
        f"{hook.name} = {hook.hook_point} = {hook.hf_name}, d_model {hook.d_model}, scale {hook.scale_factor:g}{size}"
    )


def _variant(variant: VariantPlan) -> str:
    if variant.kind == "clean":
        return f"{variant.name}: the tokens as they are"
    by = f"'{variant.mask_string}' (token {variant.mask_token})" if variant.kind != "random" else "a random token"
    each = "all tokens of a word" if variant.kind == "mask_word" else "each token"
    return f"{variant.name}: {each} replaced by {by} with probability {variant.mask_prob:g}"


def _stored(cache: ActivationCache) -> int:
    records = ((shard, dict(cache.records[shard])) for shard in cache.shards)
    return sum(sum(stored_bytes(cache.plan, shard, record).values()) for shard, record in records)


def _size(cache: ActivationCache) -> str:
    plan, there = cache.plan, _stored(cache)
    plain = sum(sum(shard_files(plan, shard).values()) for shard in cache.shards)
    packed = f", {plain / there:.2f} times less than unpacked" if cache.is_archive else ""
    planned = cache_bytes(plan)
    return bytes_for_people(there) + (packed if plain == planned else f" of {bytes_for_people(planned)}")


def _moment_rows(cache: ActivationCache) -> int | None:
    has = cache.plan.has_moments
    return sum(cache.records[shard]["moment_rows"] for shard in cache.shards) if has else None


def _moments(cache: ActivationCache) -> str:
    n_rows = _moment_rows(cache)
    if n_rows is None:
        return "none, format 1.0 had none"
    return f"mean and m2 of {n_rows:,} ordinary rows (no special token or padding) in each array"


def _opener(cache: ActivationCache) -> str:
    return "cache_spec.remote.open_cache" if cache.files.is_remote else "ActivationCache.open"


def _planned(cache: ActivationCache) -> str:
    when = _planned_at(cache)
    return f"planned {when}" if when else ""


def _planned_at(cache: ActivationCache) -> str | None:
    """When the plan was written, by the file system; the cache itself holds no time, so that equal ones are equal.
    Not known of one in a store."""
    if cache.files.is_remote:
        return None
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime((cache.path / PLAN).stat().st_mtime))
