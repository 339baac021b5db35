"""Size, time and memory of the feature pages of a wide SAE: python -m benchmarks.features [--latents 16384]

The SAE has random weights (topk) and the cache random rows, with tokens of a vocabulary of 50,000 that are as unequal
in number as those of text, so every latent has all its examples. Without a model there is no logit lens, which would
add 20 tokens a latent. Nothing is compared here: the table says what a user would get. Time is that of the processor,
of all threads together.
"""

import resource
import tempfile
import time
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
    create_cache,
    finalize_cache,
    write_shard,
)
from cache_spec.command import run_command
from evaluate.features.gather import Asked, gather
from evaluate.features.site import write_site
from train.activations import TopK
from train.run_folder import finish_run
from train.sae import SparseAutoencoder, initialise

VOCABULARY, WINDOW, SHARD_ROWS, MASK_PROB = 50_000, 128, 16_384, 0.3
POINT = HookPoint("resid_post", 1)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def make_cache(folder: Path, n_rows: int, d_model: int) -> ActivationCache:
    """Random rows, clean and masked, in whole windows."""
    variants = (VariantPlan(name="clean", kind="clean"),)
    plan = Plan(
        n_rows=n_rows,
        n_train_rows=n_rows - SHARD_ROWS,
        shard_rows=SHARD_ROWS,
        chunk_rows=1024,
        hooks=(
            HookPlan(
                name=POINT.group, hook_point=str(POINT), tl_name=POINT.tl_name, hf_name="layers.1", d_model=d_model
            ),
        ),
        variants=(
            *variants,
            VariantPlan(name="masked", kind="mask", mask_prob=MASK_PROB, mask_string="...", mask_token=7),
        ),
        window_tokens=WINDOW,
        n_train_windows=(n_rows - SHARD_ROWS) // WINDOW,
        n_held_out_windows=SHARD_ROWS // WINDOW,
        seed=0,
        model={"id": "made up for benchmarks.features", "vocab_size": VOCABULARY},
        tokenizer={"id": "made up"},
        source={"id": "random"},
    )
    create_cache(folder, plan)
    generator = np.random.default_rng(0)
    for shard in range(plan.n_shards):
        n = plan.rows_in(shard)
        place = shard * SHARD_ROWS + generator.permutation(n)
        clean = generator.standard_normal((n, d_model)).astype("<f2")
        masked = (clean + generator.standard_normal((n, d_model)) / 2).astype("<f2")
        token = np.minimum(generator.zipf(1.2, n), VOCABULARY - 1).astype("<u4")
        mask = generator.random(n) < MASK_PROB
        columns = {
            "token": token,
            "token_masked": np.where(mask, 7, token).astype("<u4"),
            "doc": (place // WINDOW // 8).astype("<u4"),
            "window": (place // WINDOW).astype("<u4"),
            "pos": (place % WINDOW).astype("<u2"),
            "flags": np.full(n, FLAG_VALID, dtype="u1"),
            "mask": mask.astype("u1"),
        }
        write_shard(folder, plan, shard, {(POINT.group, "clean"): clean, (POINT.group, "masked"): masked}, columns)
    finalize_cache(folder)
    return ActivationCache.open(folder)


def make_run(folder: Path, cache: ActivationCache, d_sae: int, k: int) -> Path:
    """A finished run of random weights."""
    hook = cache.plan.hooks[0]
    sae = SparseAutoencoder(hook.d_model, d_sae, TopK(k))
    initialise(sae, 0, entries="normal", norm=1.0)
    named = {"hook": hook.name, "hook_point": hook.hook_point, "tl_name": hook.tl_name, "hf_name": hook.hf_name}
    facts = {
        "name": f"random_d{d_sae}_k{k}",
        "recipe": "untrained",
        "config": {"arch": "topk", "d_sae": d_sae, "k": k, "seed": 0, "masked_fraction": 0.0, "corrupt": ""},
        "data": {"hook": hook.name},
        "cache": {
            "path": str(cache.path),
            "cache_id": cache.plan.cache_id,
            "model": str(cache.plan.model["id"]),
            "dataset": "random",
            "window_tokens": WINDOW,
            "prepend_bos": False,
            **named,
        },
        "norm_factor": 1.0,
    }
    folder.mkdir()
    finish_run(folder, sae, facts)
    return folder


@app.command(help="Write the feature pages of a wide, random SAE and print their size and the time and memory taken.")
def main(
    latents: Annotated[int, typer.Option(help="d_sae.")] = 16_384,
    d_model: Annotated[int, typer.Option(help="Width of the rows.")] = 64,
    rows: Annotated[int, typer.Option(help="Rows of the cache.")] = 4 * SHARD_ROWS,
    k: Annotated[int, typer.Option(help="Latents on at each row.")] = 32,
    examples: Annotated[int, typer.Option(help="Top examples of each latent.")] = 10,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder, "cache"), rows // SHARD_ROWS * SHARD_ROWS, d_model)
        run = make_run(Path(folder, "run"), cache, latents, k)
        start = time.process_time()
        found = gather(Asked(run=run, examples=examples))
        gathered = time.process_time()
        site = Path(folder, "site")
        n_bytes = write_site(found, site, {})
        written = time.process_time()
        shards = [file.stat().st_size for file in (site / "data").glob("0*.js")]
        index = sum((site / "data" / name).stat().st_size for name in ("index.js", "words.js"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"latents             {latents:,} of {len(found.contexts.rows) / latents:.1f} examples each")
    print(f"site                {n_bytes / 1e6:.1f} MB, {n_bytes / latents:,.0f} bytes a latent")
    print(f"one page loads      {(max(shards, default=0) + index) / 1e6:.2f} MB; the index page {index / 1e6:.2f} MB")
    n = found.firings.n_rows
    print(f"reading             {gathered - start:.0f} s of processor time, {n / (gathered - start):,.0f} rows/s")
    print(f"writing             {written - gathered:.0f} s of processor time")
    print(f"peak memory         {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    run_command(app)
