"""A small cache of real tokens in shuffled windows, some of them cut by the end of a shard, and a run on it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cache_fixtures import make_plan, make_shard
from evaluate_fixtures import small_sae, write_run

from cache_spec import FLAG_BOS, FLAG_SPECIAL, FLAG_VALID, ActivationCache, create_cache, finalize_cache, write_shard
from evaluate.features.gather import Asked
from evaluate.features.reading import Reading, make_reading
from harvest.model import load_model
from train.sae import SparseAutoencoder

WINDOW = 10
N_WINDOWS = 24
DEAD = 3  # of the 16 latents


def text_cache(folder: Path) -> ActivationCache:
    """240 rows in windows of 10 with a BOS, of the embedded model's tokens; 48 are held out; a masked variant."""
    tiny = load_model("tiny", weights=False)
    plan = make_plan(n_rows=WINDOW * N_WINDOWS, n_train_rows=192)
    plan = replace(plan, model={**plan.model, "id": "tiny", "revision": tiny.revision, "vocab_size": tiny.vocab_size})
    create_cache(folder, plan)
    generator = np.random.default_rng(5)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        start, n = shard * plan.shard_rows, plan.rows_in(shard)
        place = generator.permutation(np.arange(start, start + n))
        columns["window"], columns["pos"] = (part.astype("<u4") for part in np.divmod(place, WINDOW))
        columns["pos"] = columns["pos"].astype("<u2")
        columns["doc"] = (columns["window"] // 2).astype("<u4")
        columns["flags"] = np.where(columns["pos"] == 0, FLAG_VALID | FLAG_BOS | FLAG_SPECIAL, FLAG_VALID).astype("u1")
        columns["token"] = (columns["token"] % 400).astype("<u4")
        columns["mask"] = (columns["mask"] % 2).astype("u1")
        columns["token_masked"] = np.where(columns["mask"] == 1, 2, columns["token"]).astype("<u4")
        write_shard(folder, plan, shard, values, columns)
    finalize_cache(folder)
    return ActivationCache.open(folder)


def text_sae() -> SparseAutoencoder:
    """Random weights, 16 latents; one of them never fires."""
    sae = small_sae(1)
    with torch.no_grad():
        sae.b_enc[DEAD] = -1000.0
    return sae


def text_run(folder: Path) -> tuple[Path, ActivationCache, SparseAutoencoder]:
    """A finished run in a folder, its cache and its SAE as it was saved."""
    cache, sae = text_cache(folder / "cache"), text_sae()
    return write_run(folder / "runs", cache, sae), cache, sae


def asked_of(run: Path, **changes: object) -> Asked:
    """A small request."""
    return Asked(**{"run": run, "examples": 4, "before": 3, "after": 2, **changes})  # pyright: ignore


def reading_of(cache: ActivationCache, sae: SparseAutoencoder, most_rows: int = 10**6) -> Reading:
    """All rows of a cache."""
    return make_reading(cache, cache.plan.hooks[0], sae, device="cpu", most_rows=most_rows)


def whole(cache: ActivationCache, sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    """Every column of the cache, and the codes of every row, clean and masked: what the passes are compared with."""
    names = ("token", "token_masked", "doc", "window", "pos", "flags", "mask")
    found = {name: np.concatenate([cache.column(name, shard) for shard in cache.shards]) for name in names}
    for variant in ("clean", "masked"):
        x = np.concatenate([cache.activations("layer_1", variant, shard) for shard in cache.shards])
        with torch.no_grad():
            found[variant] = sae.encode(torch.from_numpy(x.astype(np.float32))).numpy()
    return found
