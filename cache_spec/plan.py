"""The plan of a cache: every fact that decides its content, frozen before the first shard is written."""

import dataclasses
import hashlib
import json
import math
import re
import types
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, get_origin, get_type_hints

from cache_spec.errors import CacheDamaged, CacheTooNew, UserError
from cache_spec.files import canonical_json
from cache_spec.hook_point import HookPoint

SPEC_VERSION = "1.1"
MAX_COUNT = 2**32 - 1  # document and window numbers are 32 bits, and the largest is the fill value
MAX_WINDOW_TOKENS = 2**16 - 1  # likewise for positions
MAX_VARIANTS = 9  # clean and one bit of `mask` for each other
MAX_ROWS = 2**48  # rows, and bytes of a file, fit 63 bits with room to spare
MAX_CHUNKS = 2**20  # inner chunks of a file, whose index is read at once
MAX_CHUNK_BYTES = 2**30  # of an inner chunk, which is read at once
MAX_NAME = 64  # letters of a variant


@dataclass(frozen=True, kw_only=True)
class HookPlan:
    """One hook point. The stored activation is the true one divided by `scale_factor`, a power of two."""

    name: str
    hook_point: str
    tl_name: str
    hf_name: str
    d_model: int
    scale_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """One run of the model over the same tokens: as they are ("clean"), or with some replaced.

    `kind` "mask" replaces tokens by the mask token, "mask_word" all tokens of a word, "random" tokens by random ones.
    """

    name: str
    kind: str
    mask_prob: float = 0.0
    mask_string: str = ""
    mask_token: int = -1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every fact that decides a cache's content. Rows [0, n_train_rows) are for training, the rest are held out."""

    n_rows: int
    n_train_rows: int
    shard_rows: int
    chunk_rows: int = 1024
    hooks: tuple[HookPlan, ...]
    variants: tuple[VariantPlan, ...]
    window_tokens: int
    n_train_windows: int
    n_held_out_windows: int
    seed: int
    row_order: str = "shuffled_within_shard"
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    spec_version: str = SPEC_VERSION

    @property
    def n_shards(self) -> int:
        """Shards in the whole cache; the last may be short."""
        return -(-self.n_rows // self.shard_rows)

    @property
    def has_moments(self) -> bool:
        """Whether the cache holds each shard's mean and m2; format 1.0 did not."""
        return self.spec_version != "1.0"

    @cached_property
    def cache_id(self) -> str:
        """16 hexadecimal digits: the start of the SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(canonical_json(dataclasses.asdict(self))).hexdigest()[:16]

    def rows_in(self, shard: int) -> int:
        """Rows of one shard."""
        assert 0 <= shard < self.n_shards
        return min(self.shard_rows, self.n_rows - shard * self.shard_rows)

    def split_of(self, shard: int) -> str:
        """ "train" or "held_out"; no shard is both."""
        assert 0 <= shard < self.n_shards
        return "train" if shard * self.shard_rows < self.n_train_rows else "held_out"

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON objects, with `cache_id` last."""
        return {**json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False)), "cache_id": self.cache_id}

    @classmethod
    def from_json(cls, facts: Any, where: str = "the plan") -> "Plan":
        """Read what `to_json` gave.

        Raises CacheTooNew for an unknown major version, CacheDamaged for unknown, missing, wrongly typed or
        contradictory facts and for a `cache_id` that is not their hash.
        """
        if not isinstance(facts, dict):
            raise CacheDamaged(f"{where} is not a JSON object")
        check_version(facts.get("spec_version"), where)
        facts = dict(facts)
        cache_id = facts.pop("cache_id", None)
        plan = _read(cls, facts, where)
        if fault := find_fault(plan):
            raise CacheDamaged(f"{where} contradicts itself: {fault}")
        if cache_id != plan.cache_id:
            raise CacheDamaged(
                f"{where} hashes to {plan.cache_id}, not to its cache_id {cache_id!s:.60}; it was changed"
            )
        return plan


def check_version(version: Any, where: str) -> None:
    """Raises CacheTooNew for another major version than ours, CacheDamaged for something that is no version."""
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    if match is None:
        raise CacheDamaged(f"{where} has spec_version {version!r:.60}, which is no version such as {SPEC_VERSION}")
    if match[1] != SPEC_VERSION.split(".")[0]:
        raise CacheTooNew(
            f"{where} has spec_version {version} and this granary reads {SPEC_VERSION}; use the granary that wrote it"
        )


def _read(cls: type, facts: Any, where: str) -> Any:
    """A dataclass from a JSON object with exactly its fields, each of exactly its type."""
    if not isinstance(facts, dict):
        raise CacheDamaged(f"{where} is not a JSON object")
    wanted = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(facts) - wanted):
        raise CacheDamaged(f"{where} has the unknown field '{unknown[0]:.60}'")
    if missing := sorted(wanted - set(facts)):
        raise CacheDamaged(f"{where} lacks the field '{missing[0]}'")
    hints = get_type_hints(cls)
    return cls(**{name: _read_value(hints[name], facts[name], f"{where}, {name}") for name in facts})


def _read_value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise CacheDamaged(f"{where} is not a list")
        return tuple(_read(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    plain = _plain(hint)
    if type(value) is not plain:
        raise CacheDamaged(f"{where} is {value!r:.60}, not of type {plain.__name__}")
    return value


def _plain(hint: Any) -> type:
    return get_origin(hint) if isinstance(hint, types.GenericAlias) else hint


def check_plan(plan: Plan) -> None:
    """Raises UserError for a plan that cannot be a cache: a wrong type, a contradiction, a number out of range."""
    if fault := _find_wrong_type(plan, "plan") or find_fault(plan):
        raise UserError(f"cannot make a cache of this plan: {fault}")


def _find_wrong_type(facts: Any, where: str) -> str:
    hints = get_type_hints(type(facts))
    for field in dataclasses.fields(facts):
        value, plain, name = getattr(facts, field.name), _plain(hints[field.name]), f"{where}.{field.name}"
        if type(value) is not plain:
            return f"{name} is {value!r:.60} of type {type(value).__name__}, not of type {plain.__name__}"
        faults = [_find_wrong_type(item, f"{name}[{i}]") for i, item in enumerate(value)] if plain is tuple else []
        if fault := next(filter(None, faults), ""):
            return fault
        if plain is dict:
            try:
                same = json.loads(canonical_json(value)) == value
            except (TypeError, ValueError) as error:
                return f"{name} cannot be written as JSON ({error})"
            if not same:
                return f"{name} does not survive JSON; use strings, numbers, lists and string keys"
    return ""


def find_fault(plan: Plan) -> str:
    """What is wrong with the numbers and names of a plan whose types are right; empty if nothing."""
    for sound, fault in _conditions(plan):
        if not sound:
            return fault
    return ""


def _conditions(plan: Plan) -> list[tuple[bool, str]]:
    names = [hook.name for hook in plan.hooks]
    variants = [variant.name for variant in plan.variants]
    n_windows = plan.n_train_windows + plan.n_held_out_windows
    split = plan.n_train_rows
    sizes = 0 < plan.chunk_rows <= plan.shard_rows <= MAX_ROWS
    conditions = [
        (0 < plan.n_rows <= MAX_ROWS, f"n_rows is {plan.n_rows}, and a cache has at least one row, at most {MAX_ROWS}"),
        (sizes, f"shard_rows and chunk_rows must be positive, chunk_rows the smaller, and at most {MAX_ROWS}"),
        (
            sizes and plan.shard_rows % plan.chunk_rows == 0,
            f"shard_rows {plan.shard_rows} is no multiple of chunk_rows",
        ),
        (
            sizes and plan.shard_rows // plan.chunk_rows <= MAX_CHUNKS,
            f"a shard of {plan.shard_rows} rows has more than {MAX_CHUNKS} inner chunks",
        ),
        (
            all(2 * plan.chunk_rows * hook.d_model <= MAX_CHUNK_BYTES for hook in plan.hooks),
            f"an inner chunk of {plan.chunk_rows} rows has more than {MAX_CHUNK_BYTES} bytes",
        ),
        (0 <= split <= plan.n_rows, f"n_train_rows {split} is not between 0 and n_rows"),
        (sizes and (split == plan.n_rows or split % plan.shard_rows == 0), f"n_train_rows {split} splits a shard"),
        (0 < plan.window_tokens <= MAX_WINDOW_TOKENS, f"window_tokens must be 1 to {MAX_WINDOW_TOKENS}"),
        (min(plan.n_train_windows, plan.n_held_out_windows) >= 0, "a number of windows is negative"),
        (n_windows <= MAX_COUNT, f"{n_windows} windows are more than {MAX_COUNT}"),
        (plan.row_order in ("shuffled_within_shard", "sequence"), f"row_order '{plan.row_order:.60}' is unknown"),
        (bool(names) and len(set(names)) == len(names), f"hooks must be one or more, each once: {names!s:.200}"),
        (variants[:1] == ["clean"], f"the first variant must be clean: {variants!s:.200}"),
        (len(set(variants)) == len(variants) <= MAX_VARIANTS, f"variants must differ and be at most {MAX_VARIANTS}"),
    ]
    return [*conditions, *map(_hook_condition, plan.hooks), *map(_variant_condition, plan.variants)]


def _hook_condition(hook: HookPlan) -> tuple[bool, str]:
    try:
        point = HookPoint.parse(hook.hook_point)
    except UserError as error:
        return False, str(error)
    scale = hook.scale_factor
    power = math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5
    sound = hook.name == point.group and hook.d_model > 0 and power
    return (
        sound,
        f"hook '{hook.name:.60}' needs the name {point.group}, a positive d_model and a power of two to scale by",
    )


def _variant_condition(variant: VariantPlan) -> tuple[bool, str]:
    kinds = ("clean",) if variant.name == "clean" else ("mask", "mask_word", "random")
    # a name that ends like a moment could be that of another variant's array
    named = re.fullmatch(r"[a-z][a-z0-9_]*(?<!_mean)(?<!_m2)", variant.name) is not None
    named = named and len(variant.name) <= MAX_NAME
    sound = named and variant.kind in kinds and 0.0 <= variant.mask_prob <= 1.0
    wanted = f"a lower-case name of at most {MAX_NAME} letters, a kind of {kinds} and a probability from 0 to 1"
    return sound, f"variant '{variant.name:.60}' needs {wanted}"
