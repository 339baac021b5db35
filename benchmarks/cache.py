"""What the cache format costs: checksums, moments, a whole shard, packing it, and opening a cache of many shards.

python -m benchmarks.cache [--d-model 2304] [--rows 16384] [--shards 1000]

Rates are in GB/s of fp16 rows, the median of five, in CPU time: the time that a harvest's writer takes from the model.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cache_spec import (
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
from cache_spec.files import crc32c
from cache_spec.moments import moments_of
from cache_spec.packing import pack_all

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def make_plan(d_model: int, shard_rows: int, chunk_rows: int, n_shards: int) -> Plan:
    """One hook point, clean rows only."""
    point = HookPoint("resid_post", 1)
    hook = HookPlan(
        name=point.group,
        hook_point=str(point),
        tl_name=point.tl_name,
        hf_name="model.layers.1",
        d_model=d_model,
    )
    return Plan(
        n_rows=n_shards * shard_rows,
        n_train_rows=n_shards * shard_rows,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        hooks=(hook,),
        variants=(VariantPlan(name="clean", kind="clean"),),
        window_tokens=128,
        n_train_windows=n_shards * shard_rows,
        n_held_out_windows=0,
        seed=0,
        model={"id": "made-up"},
        tokenizer={"id": "made-up"},
        source={"id": "made-up"},
    )


def columns_of(plan: Plan) -> dict[str, np.ndarray]:
    """Columns of a shard of ordinary rows."""
    columns = {name: np.zeros(plan.shard_rows, dtype) for name, dtype in column_types(plan).items()}
    columns["flags"][:] = FLAG_VALID
    return columns


def cpu_seconds(work: Callable[[int], object], rounds: int = 5) -> float:
    """The median CPU time of a call, which gets the number of its round."""
    seconds = []
    for i in range(rounds):
        start = time.process_time()
        work(i)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def open_seconds(folder: Path, n_shards: int) -> float:
    """CPU seconds to open a complete cache of many tiny shards."""
    plan = make_plan(d_model=2, shard_rows=8, chunk_rows=8, n_shards=n_shards)
    create_cache(folder, plan)
    rows = np.ones((8, 2), np.float16)
    for shard in range(n_shards):
        write_shard(folder, plan, shard, {("layer_1", "clean"): rows}, columns_of(plan))
    finalize_cache(folder)
    return cpu_seconds(lambda _: ActivationCache.open(folder), rounds=3)


@app.command()
def main(
    d_model: Annotated[int, typer.Option(help="Width of the rows.")] = 2304,
    rows: Annotated[int, typer.Option(help="Rows of the shard; a multiple of 1024.")] = 16384,
    shards: Annotated[int, typer.Option(help="Shards of the cache that is opened.")] = 1000,
) -> None:
    """Print the table."""
    plan = make_plan(d_model, shard_rows=rows, chunk_rows=1024, n_shards=5)
    values = np.random.default_rng(0).normal(size=(rows, d_model)).astype(np.float16)
    ordinary, columns = np.ones(rows, bool), columns_of(plan)
    chunks = [values[first : first + 1024].tobytes() for first in range(0, rows, 1024)]
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        create_cache(cache, plan)
        table = {
            "crc32c": lambda _: crc32c(values),
            "mean and m2": lambda _: moments_of(values, ordinary),
            "mean and m2 by plain float64 numpy": lambda _: np.var(values.astype(np.float64), axis=0),
            "a whole shard, written": lambda i: write_shard(cache, plan, i, {("layer_1", "clean"): values}, columns),
            "packed for an archive, level 5, random rows": lambda _: list(pack_all(chunks, 5)),
        }
        for name, work in table.items():
            print(f"{name:<48}{values.nbytes / cpu_seconds(work) / 1e9:>8.3f} GB/s", flush=True)
        print(f"{f'a cache of {shards:,} shards, opened':<48}{open_seconds(Path(scratch) / 'many', shards):>8.3f} s")


if __name__ == "__main__":
    run_command(app)
