"""A small cache that an SAE can learn from, and the configurations to train on it."""

import re
from dataclasses import replace
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
from train.config import DataConfig, RunConfig
from train.names import available

N_FEATURES = 24
SCALE = 4.0  # stored = true / SCALE


def make_training_cache(
    path: Path,
    *,
    n_train: int = 192,
    n_held_out: int = 64,
    shard_rows: int = 64,
    d_model: int = 8,
    mask_prob: float = 0.3,
    masked: bool = True,
    bos_share: float = 0.1,
    layers: tuple[int, ...] = (1,),
    seed: int = 0,
) -> ActivationCache:
    """Rows are sums of a few random directions; masked ones are near their clean twin or, where masked, all alike.

    Rows of first tokens are thirty times as long, so whoever fails to leave them out notices.
    """
    points = [HookPoint("resid_post", layer) for layer in layers]
    variants = [VariantPlan(name="clean", kind="clean")]
    if masked:
        variants.append(VariantPlan(name="masked", kind="mask", mask_prob=mask_prob, mask_string="...", mask_token=7))
    plan = Plan(
        n_rows=n_train + n_held_out,
        n_train_rows=n_train,
        shard_rows=shard_rows,
        chunk_rows=16,
        hooks=tuple(
            HookPlan(
                name=point.group,
                hook_point=str(point),
                tl_name=point.tl_name,
                hf_name=f"model.layers.{point.layer}",
                d_model=d_model,
                scale_factor=SCALE,
            )
            for point in points
        ),
        variants=tuple(variants),
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
    directions = rng.normal(size=(N_FEATURES, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for shard in range(plan.n_shards):
        clean, twin, columns = _rows(plan, rng, directions, plan.rows_in(shard), bos_share)
        activations = {}
        for point in points:
            activations[point.group, "clean"] = (clean / SCALE).astype("<f2")
            if masked:
                activations[point.group, "masked"] = (twin / SCALE).astype("<f2")
        write_shard(path, plan, shard, activations, columns)
    finalize_cache(path)
    return ActivationCache.open(path)


def _rows(plan: Plan, rng: np.random.Generator, directions: np.ndarray, n: int, bos_share: float):
    codes = (rng.random((n, N_FEATURES)) < 0.1) * (1 + rng.random((n, N_FEATURES)))
    clean = codes @ directions + 0.5 + 0.02 * rng.normal(size=(n, directions.shape[1]))
    replaced = rng.random(n) < plan.variants[-1].mask_prob
    first = rng.random(n) < bos_share
    clean[first] *= 30
    replaced &= ~first
    twin = clean + 0.05 * rng.normal(size=clean.shape)
    twin[replaced] = 3 * directions[0] + 0.02 * rng.normal(size=(int(replaced.sum()), directions.shape[1]))
    columns = {name: np.zeros(n, dtype) for name, dtype in column_types(plan).items()}
    columns["flags"][:] = FLAG_VALID
    columns["flags"][first] |= FLAG_BOS | FLAG_SPECIAL
    columns["mask"][:] = replaced
    return clean, twin, columns


DATA = DataConfig(hook="layer_1", n_tokens=32 * 60, batch_size=32)
RUN = RunConfig(
    name="run",
    arch="batchtopk",
    d_sae=32,
    k=3,
    lr=1e-2,
    warmup_steps=5,
    decay_start=48,
    sparsity_warmup_steps=10,
    anneal_start=20,
    threshold_start=5,
    threshold_beta=0.9,
    dead_tokens=320,
)


WITHOUT_K = ("standard", "standard_april", "gated", "p_anneal")


def run_config(arch: str = "batchtopk", **changes) -> RunConfig:
    """A short run; its name is the architecture unless it says another."""
    return replace(RUN, **{"arch": arch, "name": arch, "k": 0 if arch in WITHOUT_K else 3, **changes})


def sweep_runs() -> list[RunConfig]:
    """Every architecture, with everything beside it that a step may depend on."""
    others = [arch for arch in available("architectures") if arch not in ("topk", "jumprelu", "matryoshka")]
    return [
        *(run_config(arch) for arch in others),
        run_config("matryoshka", name="masked", masked_fraction=0.3),
        run_config("topk", name="noisy", corrupt="gaussian=0.3"),
        run_config("jumprelu", name="dropped", corrupt="dropout=0.2", masked_fraction=0.5),
        run_config("batchtopk", name="rising", masked_fraction=0.5, masked_schedule="linear=40", consistency=0.1),
        run_config("standard", name="resampled", resample_every=16, dead_tokens=64),
    ]


def contents(out: Path) -> dict[str, bytes]:
    """Every file; without the commit, for somebody may commit while the tests run."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: re.sub(rb'"git_commit": "\w+"', b"", data) for name, data in found.items()}
