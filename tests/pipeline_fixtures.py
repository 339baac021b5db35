"""A reader whose activations can be recomputed exactly, and small plans for it."""

import dataclasses

import numpy as np
import torch
from cache_fixtures import make_plan
from harvest_fixtures import make_tokenizer

from cache_spec import HookPoint, Plan, VariantPlan
from harvest.masking import window_inputs
from harvest.pipeline import Job
from harvest.windows import Windows

TOKENIZER = make_tokenizer("gpt_neox")
_MODULUS = 1021  # small enough that fp16 holds every value exactly


def signature(tokens: torch.Tensor, before: torch.Tensor | int = 0) -> torch.Tensor:
    """tokens [batch, length] -> [batch, length]: a number that depends on every token up to each, and on the order."""
    here, values = before + torch.zeros(len(tokens), dtype=torch.int64), []
    for token in tokens.T:
        here = (here * 31 + token + 7) % _MODULUS
        values.append(here)
    return torch.stack(values, dim=1)


def activation(signatures: torch.Tensor, layer: int, d_model: int) -> torch.Tensor:
    """[batch, length] -> [batch, length, d_model]."""
    return ((signatures[..., None] + torch.arange(d_model) * 5 + layer * 11) % _MODULUS).float()


class ExactReader:
    """Stands in for a causal model; counts the tokens it reads."""

    device = torch.device("cpu")

    def __init__(self, plan: Plan, reuse: bool = False) -> None:
        self.hook_points = tuple(HookPoint.parse(hook.hook_point) for hook in plan.hooks)
        self._d_model = plan.hooks[0].d_model
        self._reuse = reuse
        self.n_tokens, self.shapes = 0, []

    def read(self, tokens):
        self._count(tokens)
        return self._found(signature(tokens))

    def can_continue(self, window_tokens):
        return self._reuse

    def read_kept(self, tokens):
        kept = signature(tokens)
        self._count(tokens)
        return self._found(kept), kept

    def read_after(self, kept, rows, start, tokens):
        self._count(tokens)
        return self._found(signature(tokens, kept[rows, start - 1]))

    def _count(self, tokens):
        self.n_tokens += tokens.numel()
        self.shapes.append(tuple(tokens.shape))

    def _found(self, signatures):
        return {point: activation(signatures, point.layer, self._d_model) for point in self.hook_points}


def small_job(*, probs=(0.3,), batch_windows=3, n_train_rows=128, n_rows=150, pad=False, layers=(1,), reuse=False):
    """A job of three shards of 64 rows, of windows of 10 tokens, one of them held out and short."""
    masked = [
        VariantPlan(name=f"masked{f'_{i}' if i else ''}", kind="mask", mask_prob=p, mask_string="...", mask_token=2)
        for i, p in enumerate(probs)
    ]
    plan = make_plan(n_rows=n_rows, n_train_rows=n_train_rows, layers=layers)
    plan = dataclasses.replace(
        plan,
        variants=(plan.variants[0], *masked),
        n_train_windows=-(-n_train_rows // plan.window_tokens),
        n_held_out_windows=-(-(n_rows - n_train_rows) // plan.window_tokens),
    )
    rng = np.random.default_rng(0)
    shape = plan.n_train_windows + plan.n_held_out_windows, plan.window_tokens
    tokens = rng.integers(3, len(TOKENIZER), shape).astype(np.uint32)
    tokens[:, 0] = 0  # BOS
    windows = Windows(tokens=tokens, docs=rng.integers(0, 9, shape).astype(np.uint32), n_documents=9)
    return Job(
        plan=plan,
        windows=windows,
        tokenizer=TOKENIZER,
        reader=ExactReader(plan, reuse),  # pyright: ignore[reportArgumentType]
        batch_windows=batch_windows,
        pad=pad,
    )


def collector():
    """(a `write` that keeps copies of what it is given, what it has kept: shard -> (activations, columns))."""
    kept = {}

    def write(shard, arrays, columns):
        kept[shard] = {name: array.copy() for name, array in arrays.items()}, columns

    return write, kept


def files_of(cache):
    """Every file of a cache and its bytes: nothing in one says when, where or by whom it was made."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def wanted_rows(job, columns, hook, variant):
    """The exact activations of the rows that `columns` describe."""
    numbers = np.arange(len(job.windows.tokens))
    inputs, _ = window_inputs(job.tokenizer, job.plan.variants, job.plan.seed, numbers, job.windows.tokens)
    read = torch.from_numpy(inputs[variant].astype(np.int64))
    layer = HookPoint.parse(hook.hook_point).layer
    values = activation(signature(read), layer, hook.d_model).numpy()
    return values[columns["window"], columns["pos"]]
