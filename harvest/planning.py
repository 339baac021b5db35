"""From what was asked to the frozen plan of a cache: how many rows and shards, which windows, which scale."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from cache_spec.errors import CacheConflict, UserError
from cache_spec.hook_point import HookPoint
from cache_spec.plan import SPEC_VERSION, HookPlan, Plan, VariantPlan, check_plan
from harvest.masking import special_ids
from harvest.model import LoadedModel, hf_name
from harvest.options import MASK_KINDS
from harvest.pilot import check_scales, largest_activations, scale_for
from harvest.reader import Reader
from harvest.request import Request
from harvest.text import open_text, text_bytes, text_facts, text_id
from harvest.windows import TextTooShort, Windows, cut_windows, file_sha256

CHUNK_ROWS = 1024
_GOOD_SHARD_ROWS = 2**14
_GOOD_TRAIN_SHARDS, _MIN_TRAIN_SHARDS = 16, 4
# Activations of one shard over all hook points and variants. Two such are in memory at once; it is no share of the
# memory of this machine, for the same command must lead to the same shards on another.
_SHARD_BYTES = 2**30


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

    Raises UserError if too few tokens are asked for, or more than a cache can number.
    """
    layout = choose_layout(request.n_tokens, request.held_out, _row_bytes(loaded, request))
    plan = Plan(
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
                scale_factor=asked or 1.0,
            )
            for point, asked in zip(request.hook_points, request.scale_factors, strict=True)
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
    check_plan(plan)
    return plan


def make_plan(loaded: LoadedModel, reader: Reader, request: Request) -> tuple[Plan, Windows]:
    """Read the text, cut and permute its windows, try the model on a few, and freeze every fact.

    Raises UserError for text that is too short or unreadable, for a model that gives no finite activations, and for
    a scale factor that does not bring them within fp16.
    """
    plan = outline(loaded, request)
    facts = text_facts(request.dataset)  # before the text is read: an edit meanwhile shows as another checksum
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
    hooks = _scaled_hooks(plan, request, largest_activations(reader, loaded.tokenizer, plan, windows))
    read = {
        "revision": text.revision,
        **_asked_revision(text.revision, request.dataset),
        **facts,
        "n_documents": windows.n_documents,
        "windows_sha256": file_sha256(windows.tokens),
        "window_docs_sha256": file_sha256(windows.docs),
    }
    return replace(plan, hooks=hooks, source={**plan.source, **read}), windows


def _scaled_hooks(plan: Plan, request: Request, absmax: dict[HookPoint, float]) -> tuple[HookPlan, ...]:
    """Each hook point with the scale that its pilot needs, or with the one asked for; and a line that says so."""
    check_scales(dict(zip(request.hook_points, request.scale_factors, strict=True)), absmax)
    hooks = tuple(
        replace(hook, scale_factor=asked or scale_for(absmax[point]))
        for hook, point, asked in zip(plan.hooks, request.hook_points, request.scale_factors, strict=True)
    )
    said = [
        f"{hook.hook_point} reaches {absmax[point]:,.4g}, stored / {hook.scale_factor:g}"
        for hook, point in zip(hooks, request.hook_points, strict=True)
    ]
    print(f"pilot     {'; '.join(said)}", flush=True)
    return hooks


def differences(plan: Plan, loaded: LoadedModel, request: Request) -> list[str]:
    """Where a cache's plan is not what was asked, as the options that say so; empty if the harvest can go on.

    The model is known by its revision, wherever its folder is now; the text by its name and, while its files are
    there, by their size. Its tokens are kept beside the plan, so neither a hub nor the text is needed again.
    Raises CacheConflict for a plan of an older format, whose shards this granary no longer writes.
    """
    if plan.spec_version != SPEC_VERSION:
        raise CacheConflict(
            f"the cache there was begun in format {plan.spec_version} and this granary writes {SPEC_VERSION}; read it "
            "as it is, finish it with the granary that began it, or choose another --out"
        )
    scales = [hook.scale_factor for hook in plan.hooks]
    # With other --layers there is nothing to compare, and that is said.
    asked_scales = request.scale_factors if len(scales) == len(request.scale_factors) else scales
    pairs = {
        **_model_pairs(plan.model, _model_facts(loaded)),
        "the tokenizer": (plan.tokenizer["sha256"][:12], _tokenizer_facts(loaded)["sha256"][:12]),
        "--dataset": (plan.source.get("id"), text_id(request.dataset)),
        "--layers": ([hook.hook_point for hook in plan.hooks], [str(point) for point in request.hook_points]),
        "--tokens": (plan.source.get("n_tokens_asked"), request.n_tokens),
        "--context": (plan.window_tokens, request.window_tokens),
        "--held-out": (plan.source.get("held_out"), float(request.held_out)),
        "--seed": (plan.seed, request.seed),
        "--scale-factor": (scales, [asked or old for asked, old in zip(asked_scales, scales, strict=True)]),
        **_variant_pairs(plan.variants, request.variants),
    }
    unlike = [
        f"{option} {_short(there)}, not {_short(asked)}" for option, (there, asked) in pairs.items() if there != asked
    ]
    return unlike or _other_text(plan, request.dataset)


def _model_pairs(there: dict[str, Any], asked: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    labels = {"id": "--model", "revision": "the revision of --model", "dtype": "--dtype", "attention": "--attention"}
    if there["revision"] == asked["revision"]:
        there = {**there, "id": asked["id"]}
    return {labels.get(key, f"the model's {key}"): (there.get(key), fact) for key, fact in asked.items()}


def _variant_pairs(there: tuple[VariantPlan, ...], asked: tuple[VariantPlan, ...]) -> dict[str, tuple[Any, Any]]:
    """The names of variants follow from their kind and place, so lists of probabilities compare them one by one."""
    old, new = (_of_kind(variants, "mask") for variants in (there, asked))
    pairs: dict[str, tuple[Any, Any]] = {
        "--mask-prob": (_probabilities(old), _probabilities(new)),
        "--random-prob": (_probabilities(_of_kind(there, "random")), _probabilities(_of_kind(asked, "random"))),
    }
    if old and new:
        units = {kind: unit for unit, kind in MASK_KINDS.items()}
        pairs["--mask-string"] = (old[0].mask_string, new[0].mask_string)
        pairs["the token of --mask-string"] = (old[0].mask_token, new[0].mask_token)
        pairs["--mask-unit"] = (units[old[0].kind], units[new[0].kind])
    return pairs


def _of_kind(variants: tuple[VariantPlan, ...], kind: str) -> list[VariantPlan]:
    return [variant for variant in variants if variant.kind.startswith(kind)]


def _probabilities(variants: list[VariantPlan]) -> list[float]:
    return [variant.mask_prob for variant in variants] or [0]


def _other_text(plan: Plan, dataset: str) -> list[str]:
    """The difference to a text of the same name: another revision on the hub, other bytes here."""
    source, asked = plan.source, dataset.partition("@")[2]
    if source.get("revision") and not _means(asked, source):
        return [f"--dataset at revision {source['revision'][:12]}, not {asked}"]
    # Only the size: its tokens are kept with the plan, so hashing a terabyte again would say nothing that matters.
    facts = text_bytes(dataset) if "text_bytes" in source else {}
    if {key: source[key] for key in facts} == facts:
        return []
    return [f"--dataset of {source['text_bytes']:,} bytes, not of {facts['text_bytes']:,}"]


def _means(asked: str, source: dict[str, Any]) -> bool:
    """Whether a revision of a hub data set is the plan's: none, a commit, or the branch or tag given at first (the
    hub could say where another one leads, but a resume does not need the hub)."""
    is_commit = re.fullmatch(r"[0-9a-f]{7,40}", asked) is not None
    return asked in ("", source.get("revision_asked")) or (is_commit and source["revision"].startswith(asked))


def _asked_revision(revision: str, dataset: str) -> dict[str, str]:
    asked = dataset.partition("@")[2] if revision else ""
    return {"revision_asked": asked} if asked else {}


def _row_bytes(loaded: LoadedModel, request: Request) -> int:
    return 2 * loaded.d_model * len(request.hook_points) * len(request.variants)


def _check_vocabulary(loaded: LoadedModel, windows: Windows) -> None:
    n_vocab, largest = loaded.vocab_size, int(windows.tokens.max())
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
    return {
        "id": loaded.name,
        "revision": loaded.revision,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "n_layers": loaded.n_layers,
        "family": loaded.family,
        "vocab_size": loaded.vocab_size,
        "attention": str(loaded.model.config._attn_implementation),
    }


def _tokenizer_facts(loaded: LoadedModel) -> dict[str, str]:
    """With every id that decides which tokens are special, masked or begin a window."""
    tokenizer = loaded.tokenizer
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    facts = json.dumps([tokenizer.get_vocab(), special_ids(tokenizer), ends], sort_keys=True)
    return {"id": loaded.name, "sha256": hashlib.sha256(facts.encode()).hexdigest()}


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else repr(value)


def _power_of_two_below(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
