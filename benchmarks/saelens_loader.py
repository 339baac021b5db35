"""SAELens's side of the loader benchmark: runs where SAELens is installed, and imports nothing of ours.

    python saelens_loader.py ROWS D_MODEL CONTEXT BATCH_SIZE N_BATCHES N_MIXED FOLDER

ROWS is a file of fp16 rows. They are written to FOLDER, if it is not there, as the Arrow dataset that SAELens caches,
and read by its ActivationsStore in fp16 (its default, float32, is several times slower) with its default share of
mixing in a buffer of N_MIXED batches. Each line on standard input asks for N_BATCHES; the answer is a line with the
seconds.
"""

import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import datasets  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from sae_lens.training.activations_store import ActivationsStore  # pyright: ignore[reportMissingImports]

HOOK = "blocks.1.hook_resid_post"


def write_dataset(rows: np.ndarray, folder: str) -> None:
    """[windows, context, d_model] as SAELens's cache runner stores them."""
    shape = rows.shape[1:]
    features = datasets.Features({HOOK: datasets.Array2D(shape=shape, dtype="float16")})

    def windows():
        for window in rows:
            yield {HOOK: window}

    datasets.Dataset.from_generator(windows, features=features, cache_dir=folder + "-made").save_to_disk(folder)


def open_store(folder: str, context: int, d_model: int, batch_size: int, n_mixed: int) -> ActivationsStore:
    """The loader of its training from cached activations; the model is only asked for when nothing is cached."""
    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=context,
        d_in=d_model,
        n_batches_in_buffer=-(-n_mixed * batch_size // context),  # it calls windows batches here
        total_training_tokens=10**9,
        store_batch_size_prompts=max(1, n_mixed // 4 * batch_size // context, batch_size // context),
        train_batch_size_tokens=batch_size,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float16",
        cached_activations_path=folder,
    )


def main(file: str, d_model: int, context: int, batch_size: int, n_batches: int, n_mixed: int, folder: str) -> None:
    """Answer until standard input ends."""
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    if not Path(folder).exists():
        write_dataset(np.memmap(file, np.float16, "r").reshape(-1, context, d_model), folder)
    store = open_store(folder, context, d_model, batch_size, n_mixed)
    batch = store.next_batch()
    assert batch.dtype == torch.float16
    assert batch.shape == (batch_size, d_model)
    print(version("sae-lens"), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(n_batches):
            store.next_batch()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    rows, *sizes, where = sys.argv[1:]
    width, window, batch, count, mixed = map(int, sizes)
    main(rows, width, window, batch, count, mixed, where)
