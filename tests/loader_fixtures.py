"""Caches for the loader's tests: hook points of different widths, rows that differ everywhere, any size."""

from pathlib import Path

import numpy as np

from cache_spec import (
    FLAG_BOS,
    FLAG_SPECIAL,
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

WIDTHS = {1: (8, 4.0), 3: (6, 0.5)}  # layer -> (d_model, scale_factor)


def make_loader_cache(
    path: Path,
    *,
    n_rows: int = 256,
    n_train: int = 192,
    shard_rows: int = 64,
    chunk_rows: int = 16,
    widths: dict[int, tuple[int, float]] = WIDTHS,
    seed: int = 0,
) -> ActivationCache:
    """Random rows in two variants, a tenth of them first tokens, three tenths replaced."""
    hooks = []
    for layer, (d_model, scale_factor) in widths.items():
        point = HookPoint("resid_post", layer)
        hooks.append(
            HookPlan(
                name=point.group,
                hook_point=str(point),
                tl_name=point.tl_name,
                hf_name=f"model.layers.{layer}",
                d_model=d_model,
                scale_factor=scale_factor,
            )
        )
    masked = VariantPlan(name="masked", kind="mask", mask_prob=0.3, mask_string="...", mask_token=7)
    plan = Plan(
        n_rows=n_rows,
        n_train_rows=n_train,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        hooks=tuple(hooks),
        variants=(VariantPlan(name="clean", kind="clean"), masked),
        window_tokens=10,
        n_train_windows=100,
        n_held_out_windows=100,
        seed=seed,
        model={"id": "made-up"},
        tokenizer={"id": "made-up"},
        source={"id": "made-up text"},
    )
    create_cache(path, plan)
    rng = np.random.default_rng(seed)
    for shard in range(plan.n_shards):
        n = plan.rows_in(shard)
        activations = {
            (hook.name, variant.name): _rows(rng, n, hook.d_model) for hook in hooks for variant in plan.variants
        }
        columns = {name: np.zeros(n, dtype) for name, dtype in column_types(plan).items()}
        first = rng.random(n) < 0.1
        columns["flags"][:] = np.where(first, FLAG_VALID | FLAG_BOS | FLAG_SPECIAL, FLAG_VALID)
        columns["mask"][:] = (rng.random(n) < 0.3) & ~first
        write_shard(path, plan, shard, activations, columns)
    finalize_cache(path)
    return ActivationCache.open(path)


def _rows(rng: np.random.Generator, n: int, d_model: int) -> np.ndarray:
    """[n, d_model] fp16; a large shard repeats a few thousand rows, which is quick to make."""
    own = rng.normal(size=(min(n, 2048), d_model)).astype("<f2")
    return np.resize(own, (n, d_model))
