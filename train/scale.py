"""The scale of a cache's rows: the norm factor, and how far masking moves a row."""

from dataclasses import dataclass

from torch import Tensor

from cache_spec.errors import UserError
from train.config import DataConfig, RunConfig
from train.names import find, parse_setting


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Measured on a fixed sample of the rows to train on."""

    norm_factor: float
    """Root of the mean squared length of a clean row. SAEs are trained on rows divided by it."""
    displacement: float | None
    """Mean squared distance of a masked row from its clean twin, over the mean squared length; None if not measured."""


def measure(clean: Tensor, masked: Tensor | None) -> Scale:
    """From rows as they are in the model [n, d_model] and their masked twins. Raises UserError if all are zero."""
    mean_square = clean.double().square().sum(1).mean().item()
    if not mean_square > 0:
        raise UserError("all rows of this hook point are zero; harvest them again")
    distance = None if masked is None else (masked - clean).double().square().sum(1).mean().item() / mean_square
    return Scale(norm_factor=mean_square**0.5, displacement=distance)


def matched_corruption(text: str, fraction: float, scale: Scale) -> str:
    """`gaussian` -> `gaussian=0.41`: the strength that moves a row as far as masking this fraction of rows does.

    Mean squared displacement: fraction * mean ||masked row - clean row||^2. Raises UserError for an unknown
    corruption or one that states its own strength.
    """
    if "=" in text:
        raise UserError(f"--corrupt {text} states a strength and --match-strength asks for another; give one of them")
    if scale.displacement is None:
        raise UserError("--match-strength needs a cache with a masked variant, to measure how far masking moves rows")
    strength = find("corruptions", text).strength_for(fraction * scale.displacement)
    return f"{text}={strength:.6g}"


def recipe_label(config: RunConfig, data: DataConfig) -> str:
    """What a person calls it: "unmasked", "masked 0.5", "random 0.5" (the variant), "gaussian 0.41 (matched 0.5)"."""
    variant = data.masked_variant
    parts = [f"{variant} {config.masked_fraction:g}"] if config.masked_fraction else []
    if config.corrupt:
        name, strength = parse_setting(config.corrupt, "corruption")
        to = "" if variant == DataConfig.masked_variant else f"{variant} "
        matched = f" (matched {to}{config.matched_fraction:g})" if config.matched_fraction else ""
        parts.append(f"{name} {strength:.3g}{matched}")
    parts += [f"{data.target} target"] if data.target != "self" and parts else []
    return ", ".join(parts) or "unmasked"
