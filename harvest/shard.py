"""One shard: its windows through the model in every variant, its rows in their shuffled order."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.layout import FLAG_BOS, FLAG_SPECIAL, FLAG_VALID, column_types
from cache_spec.plan import Plan
from cache_spec.progress import Progress
from cache_spec.seeds import derive_seed
from harvest.masking import special_tokens, window_inputs
from harvest.model import LoadedModel, activations
from harvest.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a shard depends on; `batch_windows` and the device change no more than rounding."""

    plan: Plan
    windows: Windows
    loaded: LoadedModel
    batch_windows: int


def make_shard(
    job: Job, shard: int, progress: Progress | None = None
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, np.ndarray]]:
    """The activations and columns of one shard, as `write_shard` takes them: a pure function of the job."""
    plan, n_rows = job.plan, job.plan.rows_in(shard)
    numbers, skip = windows_of(plan, shard)
    tokens = np.asarray(job.windows.tokens[numbers])
    inputs, masks = window_inputs(job.loaded.tokenizer, plan.variants, plan.seed, numbers, tokens)
    # Row i of the shard is row order[i] of its windows laid end to end; `place` is the way back.
    order = row_order(plan, shard)
    place = np.argsort(order)
    arrays = {
        (hook.name, variant.name): np.empty((n_rows, hook.d_model), np.float16)
        for hook in plan.hooks
        for variant in plan.variants
    }
    for first, batch in _batches(job, inputs):
        start = first * plan.window_tokens - skip  # of this batch's first token among the shard's rows
        low, high = max(start, 0), min(start + batch[0].size, n_rows)
        rows, here = place[low:high], slice(low - start, high - start)
        for (hook, variant), values in _run_model(job, batch).items():
            arrays[hook, variant][rows] = values[here]
        if progress is not None:
            progress.advance(high - low)
    return arrays, _columns(job, numbers, tokens, inputs, masks, skip + order)


def windows_of(plan: Plan, shard: int) -> tuple[np.ndarray, int]:
    """The numbers of the windows that a shard's rows come from, and how many tokens of the first it leaves out."""
    row, first_window = shard * plan.shard_rows, 0
    if plan.split_of(shard) == "held_out":
        row, first_window = row - plan.n_train_rows, plan.n_train_windows
    start, skip = divmod(row, plan.window_tokens)
    stop = -(-(row + plan.rows_in(shard)) // plan.window_tokens)
    return first_window + np.arange(start, stop), skip


def row_order(plan: Plan, shard: int) -> np.ndarray:
    """[rows]: which of the shard's rows, in the order of its windows, stands at each place; for every variant alike."""
    generator = np.random.Generator(np.random.Philox(key=derive_seed("harvest/rows", plan.seed, shard)))
    return generator.permutation(plan.rows_in(shard))


def _batches(job: Job, inputs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(the first window's place, tokens [n_variants, n, window_tokens]), counted from the shard's first window."""
    for first in range(0, inputs.shape[1], job.batch_windows):
        yield first, inputs[:, first : first + job.batch_windows]


def _run_model(job: Job, batch: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """tokens [n_variants, n, window_tokens] -> fp16 [n * window_tokens, d_model] for each hook point and variant.

    All variants of a window share a batch, so that what differs between them is the masking alone.
    """
    plan = job.plan
    points = {HookPoint.parse(hook.hook_point): hook for hook in plan.hooks}
    tokens = torch.from_numpy(batch.reshape(-1, plan.window_tokens).astype(np.int64))
    try:
        with torch.inference_mode():
            found = activations(job.loaded, tokens, tuple(points))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{job.batch_windows} windows in {len(plan.variants)} variants do not fit on {job.loaded.device}; "
            "give a smaller --batch-windows"
        ) from error
    values = {}
    for point, hook in points.items():
        # Dividing by a power of two is exact, and has to come before fp16 could overflow.
        stored = (found[point] / hook.scale_factor).to(torch.float16).cpu().numpy()
        for variant, part in zip(plan.variants, np.split(stored, len(plan.variants)), strict=True):
            values[hook.name, variant.name] = part.reshape(-1, hook.d_model)
    return values


def _columns(
    job: Job, numbers: np.ndarray, tokens: np.ndarray, inputs: np.ndarray, masks: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """The row-aligned columns; `rows` are the places of the shard's rows among the tokens of its windows."""
    plan, tokenizer = job.plan, job.loaded.tokenizer
    window, pos = np.divmod(rows, plan.window_tokens)
    special = special_tokens(tokenizer, tokens)
    opens = (np.arange(plan.window_tokens) == 0) & (tokenizer.bos_token_id is not None)
    flags = FLAG_VALID + FLAG_BOS * opens + FLAG_SPECIAL * special
    mask_bits = sum(mask.astype(np.uint8) << bit for bit, mask in enumerate(masks[1:]))
    values = {
        "token": tokens[window, pos],
        "doc": np.asarray(job.windows.docs[numbers])[window, pos],
        "window": numbers[window],
        "pos": pos,
        "flags": flags[window, pos],
        "mask": np.broadcast_to(mask_bits, tokens.shape)[window, pos],
    }
    for variant, changed in zip(plan.variants[1:], inputs[1:], strict=True):
        values[f"token_{variant.name}"] = changed[window, pos]
    return {name: values[name].astype(dtype) for name, dtype in column_types(plan).items()}
