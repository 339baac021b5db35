"""From what was asked to the frozen plan of a cache: how many rows and shards, which windows, which scale."""

import hashlib
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.layout import FP16_MAX
from cache_spec.plan import HookPlan, Plan, VariantPlan
from harvest.masking import window_inputs
from harvest.model import LoadedModel, activations, hf_name
from harvest.request import Request
from harvest.text import open_text, text_facts, text_id
from harvest.windows import TextTooShort, Windows, cut_windows, file_sha256

CHUNK_ROWS = 1024
_GOOD_SHARD_ROWS = 2**14
_GOOD_TRAIN_SHARDS, _MIN_TRAIN_SHARDS = 16, 4
_SHARD_BYTES = 2**30  # activations of one shard over all hook points and variants, held in memory while it is made
_HEADROOM = 4.0  # the pilot sees a small part of the text
_PILOT_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many rows, and how they are cut into shards. Train rows are whole shards; held-out rows whole chunks."""

    n_train_rows: int
    n_held_out_rows: int
    shard_rows: int


def choose_layout(n_tokens: int, held_out: float, row_bytes: int) -> Layout:
    """The rows and shards for `n_tokens` rows at most; `row_bytes` counts one row over all hook points and variants.

    Shards are as large as leaves 16 train shards of at least 2^14 rows; failing that, 4 of them; and never so large
    that one shard outgrows the memory set aside for it. A reader mixes K open shards, so a few small shards mix as
    well as many large ones (docs of the cache format), but a single one would leave a batch in few windows.
    """
    n_held_out = max(1, int(n_tokens * held_out) // CHUNK_ROWS) * CHUNK_ROWS if held_out else 0
    n_train = n_tokens - n_held_out
    if n_train < CHUNK_ROWS:
        raise UserError(
            f"--tokens {n_tokens:,} is too few; the least is {CHUNK_ROWS:,} to train on"
            + (f" and {CHUNK_ROWS:,} held out (--held-out 0 keeps none)" if held_out else "")
        )
    wanted = max(n_train // _GOOD_TRAIN_SHARDS, min(n_train // _MIN_TRAIN_SHARDS, _GOOD_SHARD_ROWS))
    shard_rows = max(CHUNK_ROWS, _power_of_two_below(min(wanted, _SHARD_BYTES // row_bytes)))
    return Layout(n_train_rows=n_train // shard_rows * shard_rows, n_held_out_rows=n_held_out, shard_rows=shard_rows)


def outline(loaded: LoadedModel, request: Request) -> Plan:
    """The plan as far as it is known without reading the text or running the model: rows, shards, names.

    Raises UserError if too few tokens are asked for.
    """
    layout = choose_layout(request.n_tokens, request.held_out, _row_bytes(loaded, request))
    return Plan(
        n_rows=layout.n_train_rows + layout.n_held_out_rows,
        n_train_rows=layout.n_train_rows,
        shard_rows=layout.shard_rows,
        chunk_rows=CHUNK_ROWS,
        hooks=tuple(
            HookPlan(
                name=point.group,
                hook_point=str(point),
                tl_name=point.tl_name,
                hf_name=hf_name(loaded, point),
                d_model=loaded.d_model,
                scale_factor=request.scale_factor or 1.0,
            )
            for point in request.hook_points
        ),
        variants=request.variants,
        window_tokens=request.window_tokens,
        n_train_windows=-(-layout.n_train_rows // request.window_tokens),
        n_held_out_windows=-(-layout.n_held_out_rows // request.window_tokens),
        seed=request.seed,
        model=_model_facts(loaded),
        tokenizer=_tokenizer_facts(loaded),
        source={
            "id": text_id(request.dataset),
            "n_tokens_asked": request.n_tokens,
            "held_out": float(request.held_out),
        },
    )


def make_plan(loaded: LoadedModel, request: Request) -> tuple[Plan, Windows]:
    """Read the text, cut and permute its windows, try the model on a few, and freeze every fact.

    Raises UserError for text that is too short or unreadable, and for a model that gives no finite activations.
    """
    plan = outline(loaded, request)
    text = open_text(request.dataset, request.seed)
    try:
        windows = cut_windows(
            text.documents,
            loaded.tokenizer,
            window_tokens=plan.window_tokens,
            n_train=plan.n_train_windows,
            n_held_out=plan.n_held_out_windows,
            seed=plan.seed,
        )
    except TextTooShort as short:
        raise UserError(_too_short(short, request, _row_bytes(loaded, request))) from short
    _check_vocabulary(loaded, windows)
    hooks = plan.hooks
    if not request.scale_factor:
        absmax = _pilot(loaded, request, windows)
        hooks = tuple(
            replace(hook, scale_factor=scale_for(absmax[point]))
            for hook, point in zip(hooks, request.hook_points, strict=True)
        )
    read = {
        "revision": text.revision,
        **text_facts(request.dataset),
        "n_documents": windows.n_documents,
        "windows_sha256": file_sha256(windows.tokens),
        "window_docs_sha256": file_sha256(windows.docs),
    }
    return replace(plan, hooks=hooks, source={**plan.source, **read}), windows


def differences(plan: Plan, loaded: LoadedModel, request: Request) -> list[str]:
    """Where a cache's plan is not what was asked, as the options that say so; empty if the harvest can go on.

    The text is known by its name and, while its files are there, by their checksum; its tokens are kept beside the
    plan, so it is not cut again.
    """
    asked_scale = request.scale_factor or plan.hooks[0].scale_factor
    pairs = {
        "--model": (plan.model, _model_facts(loaded)),
        "tokenizer": (plan.tokenizer, _tokenizer_facts(loaded)),
        "--dataset": (plan.source.get("id"), text_id(request.dataset)),
        "--layers": ([hook.hook_point for hook in plan.hooks], [str(point) for point in request.hook_points]),
        "--tokens": (plan.source.get("n_tokens_asked"), request.n_tokens),
        "--context": (plan.window_tokens, request.window_tokens),
        "--held-out": (plan.source.get("held_out"), float(request.held_out)),
        "--seed": (plan.seed, request.seed),
        "--scale-factor": (plan.hooks[0].scale_factor, asked_scale),
        **_variant_pairs(plan.variants, request.variants),
    }
    unlike = [
        f"{option} {_short(there)}, not {_short(asked)}" for option, (there, asked) in pairs.items() if there != asked
    ]
    return unlike or _other_text(plan, request.dataset)


def _other_text(plan: Plan, dataset: str) -> list[str]:
    """The difference to a local text of the same name. A plan of an older harvest does not know its text."""
    facts = text_facts(dataset) if "text_sha256" in plan.source else {}
    there = {key: plan.source[key] for key in facts}
    if there == facts:
        return []
    return [
        f"--dataset of {there['text_bytes']:,} bytes with SHA-256 {there['text_sha256'][:12]}, "
        f"not of {facts['text_bytes']:,} with {str(facts['text_sha256'])[:12]}"
    ]


def _row_bytes(loaded: LoadedModel, request: Request) -> int:
    return 2 * loaded.d_model * len(request.hook_points) * len(request.variants)


def scale_for(absmax: float) -> float:
    """The smallest power of two, from 1, that leaves fp16 a headroom of 4 above `absmax`."""
    return 2.0 ** max(0, math.ceil(math.log2(max(absmax, 1.0) * _HEADROOM / FP16_MAX)))


def _pilot(loaded: LoadedModel, request: Request, windows: Windows) -> dict[HookPoint, float]:
    """The largest absolute activation at each hook point over a few thousand tokens of every variant."""
    n_windows, step = (max(1, n // request.window_tokens) for n in (_PILOT_TOKENS, _PILOT_TOKENS // 8))
    absmax = dict.fromkeys(request.hook_points, 0.0)
    for first in range(0, min(n_windows, len(windows.tokens)), step):
        tokens = windows.tokens[first : first + step]
        numbers = first + np.arange(len(tokens))
        inputs, _ = window_inputs(loaded.tokenizer, request.variants, request.seed, numbers, tokens)
        batch = torch.from_numpy(inputs.reshape(-1, request.window_tokens).astype(np.int64))
        for point, activation in activations(loaded, batch, request.hook_points).items():
            largest = float(activation.abs().max())
            if not math.isfinite(largest):
                raise UserError(f"{loaded.name} gives infinite or NaN activations at {point}; try --dtype float32")
            absmax[point] = max(absmax[point], largest)
    return absmax


def _check_vocabulary(loaded: LoadedModel, windows: Windows) -> None:
    n_vocab, largest = loaded.model.config.vocab_size, int(windows.tokens.max())
    if largest >= n_vocab:
        raise UserError(
            f"the tokenizer of {loaded.name} gives the id {largest}, and the model knows ids below {n_vocab}; "
            "the folder mixes files of two models"
        )


def _too_short(short: TextTooShort, request: Request, row_bytes: int) -> str:
    there = short.n_windows * request.window_tokens
    message = f"the text is too short: {short.n_documents:,} documents give about {there:,} tokens"
    fits = int(there * 0.95)  # documents are not cut between the splits, so a little is lost
    try:
        choose_layout(fits, request.held_out, row_bytes)
    except UserError:
        return f"{message}, and the least is a few thousand; give more text"
    advice = f"--tokens {fits:,} or fewer".replace(",", "_")
    return f"{message}, and {request.n_tokens:,} were asked for; use {advice}, or more text"


def _model_facts(loaded: LoadedModel) -> dict[str, str | int]:
    config = loaded.model.config
    return {
        "id": loaded.name,
        "revision": loaded.revision,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "n_layers": loaded.n_layers,
        "family": loaded.family,
        "vocab_size": config.vocab_size,
        "attention": str(config._attn_implementation),
    }


def _tokenizer_facts(loaded: LoadedModel) -> dict[str, str]:
    vocabulary = json.dumps(loaded.tokenizer.get_vocab(), sort_keys=True)
    return {"id": loaded.name, "sha256": hashlib.sha256(vocabulary.encode()).hexdigest()}


def _variant_pairs(
    there: tuple[VariantPlan, ...], asked: tuple[VariantPlan, ...]
) -> dict[str, tuple[float | str, float | str]]:
    absent = VariantPlan(name="absent", kind="mask")
    old, new = ({variant.name: variant for variant in variants} for variants in (there, asked))
    masks = old.get("masked", absent), new.get("masked", absent)
    randoms = old.get("random", absent), new.get("random", absent)
    return {
        "--mask-prob": (masks[0].mask_prob, masks[1].mask_prob),
        "--mask-string": (masks[0].mask_string, masks[1].mask_string),
        "--random-prob": (randoms[0].mask_prob, randoms[1].mask_prob),
    }


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values())
    return ",".join(map(str, value)) if isinstance(value, list) else repr(value)


def _power_of_two_below(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
