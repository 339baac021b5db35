"""What a harvest is asked to do: the command's options, read, checked and completed with the model's defaults."""

import math
from dataclasses import dataclass

from cache_spec.counts import parse_count
from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.plan import VariantPlan
from harvest.masking import mask_token
from harvest.model import LoadedModel, defaults, hf_name


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, in full. With the same model and text it always leads to the same plan."""

    dataset: str
    hook_points: tuple[HookPoint, ...]
    variants: tuple[VariantPlan, ...]
    n_tokens: int  # rows of each variant
    window_tokens: int
    held_out: float  # share of the rows that comes from documents kept from training
    scale_factor: float  # 0: found by a pilot run
    seed: int


def make_request(
    loaded: LoadedModel,
    model: str,
    *,
    dataset: str,
    layers: str,
    tokens: str,
    mask_prob: float,
    mask_string: str,
    random_prob: float,
    context: int,
    held_out: float,
    scale_factor: float,
    seed: int,
) -> Request:
    """Read the options; an empty text or a context of 0 means the default of the model's short name.

    Raises UserError for an option out of range, a layer that the model lacks and a mask string of several tokens.
    """
    known = defaults(model)
    if not 0 <= held_out <= 0.5:
        raise UserError(f"--held-out is {held_out}, and the held-out share of the text must be from 0 to 0.5")
    if scale_factor and (scale_factor < 0 or math.frexp(scale_factor)[0] != 0.5):
        raise UserError(f"--scale-factor is {scale_factor:g}; give a power of two such as 16, or 0 to have it found")
    longest = loaded.model.config.max_position_embeddings
    window_tokens = context or min(known.window_tokens, longest)
    if not 2 <= window_tokens <= longest:
        raise UserError(f"--context is {window_tokens}, and {loaded.name} takes windows of 2 to {longest} tokens")
    return Request(
        dataset=dataset or known.dataset,
        hook_points=_hook_points(loaded, layers or known.layers),
        variants=_variants(loaded, mask_prob, mask_string, random_prob),
        n_tokens=parse_count(tokens, "--tokens"),
        window_tokens=window_tokens,
        held_out=held_out,
        scale_factor=float(scale_factor),
        seed=seed,
    )


def _hook_points(loaded: LoadedModel, layers: str) -> tuple[HookPoint, ...]:
    if not layers.strip():
        raise UserError(
            f"--layers is missing, and {loaded.name} has no default; it has {loaded.n_layers} layers, "
            f"numbered 0 to {loaded.n_layers - 1}"
        )
    points = tuple(dict.fromkeys(HookPoint.parse(part) for part in layers.split(",")))
    for point in points:
        hf_name(loaded, point)  # refuses a layer that the model lacks
    return points


def _variants(loaded: LoadedModel, mask_prob: float, mask_string: str, random_prob: float) -> tuple[VariantPlan, ...]:
    for option, p in (("--mask-prob", mask_prob), ("--random-prob", random_prob)):
        if not 0 <= p <= 1:
            raise UserError(f"{option} is {p}, and a probability must be from 0 to 1")
    variants = [VariantPlan(name="clean", kind="clean")]
    if mask_prob:
        token = mask_token(loaded.tokenizer, mask_string)
        variants.append(
            VariantPlan(
                name="masked", kind="mask", mask_prob=float(mask_prob), mask_string=mask_string, mask_token=token
            )
        )
    if random_prob:
        variants.append(VariantPlan(name="random", kind="random", mask_prob=float(random_prob)))
    return tuple(variants)
