"""What a harvest is asked to do: the command's options, read, checked and completed with the model's defaults."""

from dataclasses import dataclass

from cache_spec.counts import parse_count
from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.plan import MAX_WINDOW_TOKENS, VariantPlan
from harvest.masking import check_vocabulary, mask_token
from harvest.model import LoadedModel, defaults, hf_name
from harvest.options import MASK_KINDS, Options, check_options, parse_layers, parse_probabilities, parse_scales


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, in full. With the same model and text it always leads to the same plan."""

    dataset: str
    hook_points: tuple[HookPoint, ...]
    variants: tuple[VariantPlan, ...]
    n_tokens: int  # rows of each variant
    window_tokens: int
    held_out: float  # share of the rows that comes from documents kept from training
    scale_factors: tuple[float, ...]  # one a hook point; 0: found by a pilot run
    seed: int


def make_request(loaded: LoadedModel, model: str, options: Options) -> Request:
    """Complete the options; an empty text or a context of 0 means the default of the model's short name.

    Raises UserError for an option out of range, a layer that the model lacks and a mask string of several tokens.
    """
    check_options(options)
    known = defaults(model)
    longest = min(loaded.max_tokens or MAX_WINDOW_TOKENS, MAX_WINDOW_TOKENS)
    window_tokens = options.context or min(known.window_tokens, longest)
    if not 2 <= window_tokens <= longest:
        raise UserError(f"--context is {window_tokens}, and {loaded.name} takes windows of 2 to {longest} tokens")
    hook_points = _hook_points(loaded, options.layers or known.layers)
    variants = _variants(loaded, options)
    check_vocabulary(loaded.tokenizer, loaded.name, loaded.vocab_size, variants)
    return Request(
        dataset=options.dataset or known.dataset,
        hook_points=hook_points,
        variants=variants,
        n_tokens=parse_count(options.tokens, "--tokens"),
        window_tokens=window_tokens,
        held_out=options.held_out,
        scale_factors=_scale_factors(options.scale_factor, hook_points),
        seed=options.seed,
    )


def _hook_points(loaded: LoadedModel, layers: str) -> tuple[HookPoint, ...]:
    points = parse_layers(layers)
    if not points:
        raise UserError(
            f"--layers is missing, and {loaded.name} has no default; it has {loaded.n_layers} layers, "
            f"numbered 0 to {loaded.n_layers - 1}"
        )
    for point in points:
        hf_name(loaded, point)  # refuses a layer that the model lacks
    return points


def _scale_factors(text: str, hook_points: tuple[HookPoint, ...]) -> tuple[float, ...]:
    given = parse_scales(text)
    if unknown := [point for point in given if point is not None and point not in hook_points]:
        raise UserError(f"--scale-factor names {unknown[0]}, which --layers does not; name hook points that it does")
    return tuple(given.get(point, given.get(None, 0.0)) for point in hook_points)


def _variants(loaded: LoadedModel, options: Options) -> tuple[VariantPlan, ...]:
    masks = parse_probabilities(options.mask_prob, "--mask-prob")
    randoms = parse_probabilities(options.random_prob, "--random-prob")
    token = mask_token(loaded.tokenizer, options.mask_string) if masks else -1
    return (
        VariantPlan(name="clean", kind="clean"),
        *(
            VariantPlan(
                name=_numbered("masked", i),
                kind=MASK_KINDS[options.mask_unit],
                mask_prob=p,
                mask_string=options.mask_string,
                mask_token=token,
            )
            for i, p in enumerate(masks)
        ),
        *(VariantPlan(name=_numbered("random", i), kind="random", mask_prob=p) for i, p in enumerate(randoms)),
    )


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name
