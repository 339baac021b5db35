"""One shard without the model: which tokens are run, where each activation goes, and the columns beside them."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from cache_spec.layout import ACTIVATION, FLAG_BOS, FLAG_SPECIAL, FLAG_VALID, column_types
from cache_spec.plan import Plan
from cache_spec.seeds import derive_seed
from harvest.masking import special_tokens, window_inputs
from harvest.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What is run for one shard and what becomes of it: a pure function of the plan and its windows.

    A window at a shard's edge is run whole, and its tokens that belong to another shard are thrown away.
    """

    number: int
    n_rows: int
    inputs: np.ndarray  # [n_variants, n_windows, window_tokens]: what the model reads
    first: np.ndarray  # [n_variants, n_windows]: the first replaced position; window_tokens where nothing is replaced
    place: np.ndarray  # [n_windows, window_tokens]: the row of each token; n_rows for a token of another shard
    columns: dict[str, np.ndarray]  # as `write_shard` takes them


def prepare_shard(plan: Plan, windows: Windows, tokenizer: Tokenizer, number: int) -> Shard:
    """Draw the masks of one shard's windows and the order of its rows."""
    n_rows = plan.rows_in(number)
    numbers, skip = windows_of(plan, number)
    tokens = np.asarray(windows.tokens[numbers])
    inputs, masks = window_inputs(tokenizer, plan.variants, plan.seed, numbers, tokens)
    source = skip + row_order(plan, number)  # of each row, among the tokens of the windows laid end to end
    place = np.full(tokens.size, n_rows)
    place[source] = np.arange(n_rows)
    return Shard(
        number=number,
        n_rows=n_rows,
        inputs=inputs,
        first=np.where(masks.any(axis=2), masks.argmax(axis=2), plan.window_tokens),
        place=place.reshape(tokens.shape),
        columns=_columns(plan, tokenizer, numbers, np.asarray(windows.docs[numbers]), inputs, masks, source),
    )


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


class ShardBuffer:
    """The activations of one shard while it is made; its memory serves one shard after another."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        # One row more than a shard has takes what belongs to other shards, so that no batch needs a selection.
        self._arrays = [
            [np.empty((min(plan.shard_rows, plan.n_rows) + 1, hook.d_model), ACTIVATION) for _ in plan.variants]
            for hook in plan.hooks
        ]

    def fill(self, hook: int, variant: int, place: np.ndarray, values: np.ndarray) -> None:
        """values [n, length, d_model] of one hook point and variant go to the rows `place` [n, length]."""
        array = self._arrays[hook][variant]
        array[place.ravel()] = values.reshape(-1, array.shape[1])

    def finish(self, shard: Shard) -> dict[tuple[str, str], np.ndarray]:
        """The activations as `write_shard` takes them, once every row that was run is filled in.

        Before a window's first replaced token the model has read the same text, so those rows are the clean ones,
        bit for bit. (What the model gives differs from them by rounding, when a batch is cut otherwise.)
        """
        position = np.arange(self._plan.window_tokens)
        for variant in range(1, len(self._plan.variants)):
            same = shard.place[position < shard.first[variant][:, None]]
            for arrays in self._arrays:
                arrays[variant][same] = arrays[0][same]
        return {
            (hook.name, variant.name): array[: shard.n_rows]
            for hook, arrays in zip(self._plan.hooks, self._arrays, strict=True)
            for variant, array in zip(self._plan.variants, arrays, strict=True)
        }


def _columns(
    plan: Plan,
    tokenizer: Tokenizer,
    numbers: np.ndarray,
    docs: np.ndarray,
    inputs: np.ndarray,
    masks: np.ndarray,
    source: np.ndarray,
) -> dict[str, np.ndarray]:
    """The row-aligned columns; `source` are the places of the shard's rows among the tokens of its windows."""
    tokens = inputs[0]
    window, pos = np.divmod(source, plan.window_tokens)
    special = special_tokens(tokenizer, tokens)
    opens = (np.arange(plan.window_tokens) == 0) & (tokenizer.bos_token_id is not None)
    flags = FLAG_VALID + FLAG_BOS * opens + FLAG_SPECIAL * special
    mask_bits = sum(mask.astype(np.uint8) << bit for bit, mask in enumerate(masks[1:]))
    values = {
        "token": tokens[window, pos],
        "doc": docs[window, pos],
        "window": numbers[window],
        "pos": pos,
        "flags": flags[window, pos],
        "mask": np.broadcast_to(mask_bits, tokens.shape)[window, pos],
    }
    for variant, changed in zip(plan.variants[1:], inputs[1:], strict=True):
        values[f"token_{variant.name}"] = changed[window, pos]
    return {name: values[name].astype(dtype) for name, dtype in column_types(plan).items()}
