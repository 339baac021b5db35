"""Small made-up caches for the tests."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cache_spec import (
    HookPlan,
    HookPoint,
    Plan,
    VariantPlan,
    column_types,
    create_cache,
    derive_seed,
    finalize_cache,
    write_shard,
)


def make_plan(
    *,
    n_rows: int = 150,
    n_train_rows: int | None = None,
    shard_rows: int = 64,
    chunk_rows: int = 16,
    d_model: int = 6,
    layers: tuple[int, ...] = (1,),
    n_masked: int = 1,
    seed: int = 0,
) -> Plan:
    """A plan of a made-up model; the default has three shards, the last of them short."""
    names = ["masked", *(f"masked_{i}" for i in range(1, n_masked))][:n_masked]
    masked = [VariantPlan(name=name, kind="mask", mask_prob=0.3, mask_string="...", mask_token=7) for name in names]
    return Plan(
        n_rows=n_rows,
        n_train_rows=(n_rows - 1) // shard_rows * shard_rows if n_train_rows is None else n_train_rows,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        hooks=tuple(make_hook(layer, d_model) for layer in layers),
        variants=(VariantPlan(name="clean", kind="clean"), *masked),
        window_tokens=10,
        n_train_windows=n_rows,
        n_held_out_windows=n_rows,
        seed=seed,
        model={"id": "made-up", "revision": "0", "dtype": "float32", "n_layers": 4, "family": "toy", "vocab_size": 50},
        tokenizer={"id": "made-up", "sha256": "0" * 64},
        source={"id": "made-up text", "revision": "0", "n_documents": n_rows},
    )


def make_hook(layer: int, d_model: int, scale_factor: float = 1.0) -> HookPlan:
    """A hook point as a GPT-NeoX model would have it."""
    point = HookPoint("resid_post", layer)
    return HookPlan(
        name=point.group,
        hook_point=str(point),
        tl_name=point.tl_name,
        hf_name=f"gpt_neox.layers.{layer}",
        d_model=d_model,
        scale_factor=scale_factor,
    )


def make_shard(plan: Plan, shard: int) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, np.ndarray]]:
    """Activations and columns of one shard: random, and a pure function of the plan."""
    rng = np.random.Generator(np.random.Philox(derive_seed("tests/shard", plan.seed, shard)))
    n_rows = plan.rows_in(shard)
    activations = {
        (hook.name, variant.name): rng.normal(size=(n_rows, hook.d_model)).astype("<f2")
        for hook in plan.hooks
        for variant in plan.variants
    }
    columns = {
        name: rng.integers(0, np.iinfo(dtype).max, n_rows, dtype=dtype) for name, dtype in column_types(plan).items()
    }
    return activations, columns


def make_cache(path: Path, plan: Plan, *, shards: range | None = None, finalize: bool = True) -> Path:
    """A cache with all shards, or with some."""
    create_cache(path, plan)
    for shard in range(plan.n_shards) if shards is None else shards:
        write_shard(path, plan, shard, *make_shard(plan, shard))
    if finalize:
        finalize_cache(path)
    return path


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one example of a property, in memory where there is such a place: there are hundreds."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
