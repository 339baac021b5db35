"""The scale of a cache's rows: the norm factor, and how far masking moves a row."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cache_spec.errors import UserError
from train.config import DataConfig, RunConfig
from train.mixing import rising_steps
from train.names import find, parse_setting


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long the rows to train on are, and how far masking moves them."""

    norm_factor: float
    """Root of the mean squared length of a clean row. SAEs are trained on rows divided by it."""
    displacement: float | None
    """Mean squared distance of a masked row from its clean twin, over the mean squared length, on a fixed sample of
    the rows; None if not measured."""


@dataclass(frozen=True, kw_only=True)
class SamplePart:
    """Some rows of the sample, as they are in the model [n, d_model], and their masked twins if they are measured."""

    clean: Tensor
    masked: Tensor | None
    where: str
    """What to call the place they come from: cache, hook point and shard."""


def measure(sample: Iterable[SamplePart], mean_square: float | None = None) -> Scale:
    """The scale of a sample, which may be larger than memory. `mean_square` is the mean squared length of a clean row
    where it is known of all of them; else it is the sample's.

    Raises UserError if all rows are zero or one holds NaN or infinity.
    """
    lengths: list[float] = []  # squared, one a row: their mean is the same however the rows are parted
    distances: list[float] = []  # (small tensors kept between large ones would keep the heap from being used again)
    for part in sample:
        lengths += _squared_lengths(part.clean, part.where)
        if part.masked is not None:
            distances += _squared_lengths(part.masked - part.clean, f"the masked rows of {part.where}")
    in_sample = _mean(lengths)
    if not in_sample > 0:
        raise UserError("all rows of this hook point are zero; harvest them again")
    displacement = _mean(distances) / in_sample if distances else None
    return Scale(norm_factor=(mean_square or in_sample) ** 0.5, displacement=displacement)


def _squared_lengths(rows: Tensor, where: str) -> list[float]:
    lengths = rows.double().square_().sum(1)
    refuse_non_finite(lengths, where)
    return lengths.tolist()


def _mean(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).mean().item()


def refuse_non_finite(values: Tensor, where: str) -> None:
    """Raises UserError if one of the values is NaN or infinite: a harvest writes none, so the file was changed."""
    if n_bad := int((~values.isfinite()).sum()):
        raise UserError(
            f"{where} has NaN or infinity in {n_bad} of {len(values)} rows; find the damaged file with "
            "python -m cache_spec verify, delete its shard's record and harvest the shard again"
        )


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
    parts = []
    if config.masked_fraction:
        n_rising = rising_steps(config.masked_schedule)
        parts.append(f"{variant} {config.masked_fraction:g}" + (f" over {n_rising} steps" if n_rising else ""))
    if config.corrupt:
        name, strength = parse_setting(config.corrupt, "corruption")
        to = "" if variant == DataConfig.masked_variant else f"{variant} "
        matched = f" (matched {to}{config.matched_fraction:g})" if config.matched_fraction else ""
        parts.append(f"{name} {strength:.3g}{matched}")
    parts += [f"{data.target} target"] if data.target != "self" and parts else []
    parts += [f"consistency {config.consistency:g}"] if config.consistency else []
    parts = parts or ["unmasked"]
    parts += [f"to {data.target_hook}"] if data.target_hook else []
    parts += ["skip"] if config.skip else []
    return ", ".join(parts)
