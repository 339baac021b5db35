"""Rows a second from a warm cache: reading ahead beside a plain loop over np.memmap, and beside memcpy.

All in one run on made-up rows, each several times in turn; the table has the median and the ratio to memcpy.

    python -m benchmarks.loader [--d-model 768] [--batch-size 2048]
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer

from cache_spec import (
    FLAG_BOS,
    FLAG_VALID,
    ActivationCache,
    HookPlan,
    HookPoint,
    Plan,
    VariantPlan,
    column_types,
    create_cache,
    finalize_cache,
    write_shard,
)
from cache_spec.command import run_command
from train.config import DataConfig
from train.loader import MixedBatchLoader
from train.report import keep_freed_memory

N_SHARDS, WINDOW = 8, 128
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def make_cache(path: Path, d_model: int, shard_rows: int) -> ActivationCache:
    """Random rows in two variants; one row in 128 is a first token."""
    point = HookPoint("resid_post", 1)
    hook = HookPlan(
        name=point.group,
        hook_point=str(point),
        tl_name=point.tl_name,
        hf_name="model.layers.1",
        d_model=d_model,
        scale_factor=1.0,
    )
    masked = VariantPlan(name="masked", kind="mask", mask_prob=0.3, mask_string="...", mask_token=7)
    n_rows = N_SHARDS * shard_rows
    plan = Plan(
        n_rows=n_rows,
        n_train_rows=n_rows,
        shard_rows=shard_rows,
        chunk_rows=1024,
        hooks=(hook,),
        variants=(VariantPlan(name="clean", kind="clean"), masked),
        window_tokens=WINDOW,
        n_train_windows=n_rows // WINDOW,
        n_held_out_windows=0,
        seed=0,
        model={"id": "made-up"},
        tokenizer={"id": "made-up"},
        source={"id": "made-up text"},
    )
    create_cache(path, plan)
    rng = np.random.default_rng(0)
    rows = np.resize(rng.normal(size=(4096, d_model)).astype("<f2"), (shard_rows, d_model))
    for shard in range(N_SHARDS):
        columns = {name: np.zeros(shard_rows, dtype) for name, dtype in column_types(plan).items()}
        columns["flags"][:] = np.where(rng.random(shard_rows) < 1 / WINDOW, FLAG_VALID | FLAG_BOS, FLAG_VALID)
        write_shard(path, plan, shard, {("layer_1", variant.name): rows for variant in plan.variants}, columns)
    finalize_cache(path)
    return ActivationCache.open(path)


def streamed(cache: ActivationCache, data: DataConfig) -> Callable[[], Iterator[torch.Tensor]]:
    """An epoch of clean rows as training gets them; the files were checked and used once."""
    loader = MixedBatchLoader(cache, data, with_masked=False)

    def epoch() -> Iterator[torch.Tensor]:
        with loader.stream(0, loader.n_batches, with_masked=False) as stream:
            for rows in stream:
                yield rows.clean

    for _ in epoch():
        pass
    return epoch


def plain(cache: ActivationCache, data: DataConfig, *, random_rows: bool) -> Callable[[], Iterator[torch.Tensor]]:
    """What one writes without a loader: fancy indexing into a memmap a shard at a time, cast and scaled."""
    maps = [cache.activations("layer_1", "clean", shard) for shard in cache.train_shards]
    rng = np.random.default_rng(0)

    def epoch() -> Iterator[torch.Tensor]:
        for rows in maps:
            order = rng.permutation(len(rows)) if random_rows else np.arange(len(rows))
            for start in range(0, len(rows), data.batch_size):
                yield torch.from_numpy(rows[order[start : start + data.batch_size]]).to(torch.float32).mul_(0.5)

    for _ in epoch():
        pass
    return epoch


def copied(cache: ActivationCache, data: DataConfig) -> Callable[[], Iterator[torch.Tensor]]:
    """The ruler: memcpy of the same fp16 rows from memory into one batch's buffer."""
    source = torch.ones(cache.plan.n_rows, cache.plan.hooks[0].d_model, dtype=torch.float16)
    target = torch.ones(data.batch_size, cache.plan.hooks[0].d_model, dtype=torch.float16)

    def epoch() -> Iterator[torch.Tensor]:
        for start in range(0, len(source) - data.batch_size + 1, data.batch_size):
            yield target.copy_(source[start : start + data.batch_size])

    return epoch


@app.command()
def main(
    d_model: Annotated[int, typer.Option(help="width of the made-up rows", min=1)] = 768,
    batch_size: Annotated[int, typer.Option(help="rows in a batch", min=1)] = 2048,
    shard_rows: Annotated[int, typer.Option(help="rows in each of the 8 shards", min=1024)] = 65536,
    rounds: Annotated[int, typer.Option(help="times that each is measured", min=1)] = 5,
) -> None:
    """Make a cache in a temporary folder and print the table."""
    keep_freed_memory()  # as training does
    data = DataConfig(hook="layer_1", n_tokens=batch_size, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder) / "cache", d_model, shard_rows)
        ways = {
            "memcpy of fp16 rows": copied(cache, data),
            "np.memmap, rows in order": plain(cache, data, random_rows=False),
            "np.memmap, random rows": plain(cache, data, random_rows=True),
        }
        for io in ("mmap", "pread"):
            for readers in (1, 2, 3, 4):
                ways[f"stream, {io}, {readers} threads"] = streamed(cache, replace(data, io=io, readers=readers))
        rates = {name: [] for name in ways}
        for _ in range(rounds):
            for name, epoch in ways.items():
                start = time.perf_counter()
                n_rows = sum(len(rows) for rows in epoch())
                rates[name].append(n_rows / (time.perf_counter() - start))
    ruler = median(rates["memcpy of fp16 rows"])
    print(f"{'':<28}{'rows/s':>12}{'GB/s':>8}{'x memcpy':>10}   ({torch.get_num_threads()} threads to cast)")
    for name, measured in rates.items():
        rate = median(measured)
        print(f"{name:<28}{rate:>12,.0f}{rate * 2 * d_model / 1e9:>8.2f}{rate / ruler:>10.3f}")


if __name__ == "__main__":
    run_command(app)
