"""From the lists of the command line to the runs: their product, with a schedule that fits the number of steps."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch

from cache_spec.errors import UserError
from train.config import DataConfig, RunConfig
from train.loader import MixedBatchLoader
from train.names import find, parse_setting
from train.recipe import Forward, Recipe, StepView
from train.sae import SparseAutoencoder
from train.scale import Scale, matched_corruption
from train.step import penalties_of, recipe_of

FULL_WINDOW = 1000  # steps, from dictionary_learning; a short run gets 5 % of its steps instead
FULL_DEAD_TOKENS = 10_000_000
MIN_STEPS = 20
_NO_CORRUPTION = ("", "none")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things begin and end, in steps (dead_tokens in tokens)."""

    warmup_steps: int
    decay_start: int
    sparsity_warmup_steps: int
    threshold_start: int
    threshold_beta: float
    dead_tokens: int


def schedule_for(
    loader: MixedBatchLoader,
    warmup_steps: int | None = None,
    decay_start: int | None = None,
    sparsity_warmup_steps: int | None = None,
    threshold_start: int | None = None,
    threshold_beta: float | None = None,
    dead_tokens: int | None = None,
) -> Schedule:
    """dictionary_learning's schedule, scaled down for short runs, with what is given put in.

    Warm-up 1000 steps, sparsity warm-up 5000, threshold from step 1000 with beta 0.999: all follow from a window of
    1000 steps, or of 5 % of the steps if that is less. Dead after 10M tokens, or after 10 % of all. Decay over the
    last fifth. Raises UserError for a run of fewer than 20 steps or a value that does not fit.
    """
    n_steps, batch_size = loader.n_steps, loader.data.batch_size
    if n_steps < MIN_STEPS:
        raise UserError(
            f"{loader.data.n_tokens:,} tokens make {n_steps} steps of {batch_size:,} rows, and a run needs at least "
            f"{MIN_STEPS}; raise --tokens or lower --batch-size"
        )
    window = min(FULL_WINDOW, n_steps // 20)
    schedule = Schedule(
        warmup_steps=_or(warmup_steps, window),
        decay_start=_or(decay_start, n_steps * 4 // 5),
        sparsity_warmup_steps=_or(sparsity_warmup_steps, 5 * window),
        threshold_start=_or(threshold_start, window),
        threshold_beta=_or(threshold_beta, 1 - 1 / window),
        dead_tokens=_or(dead_tokens, min(FULL_DEAD_TOKENS, n_steps * batch_size // 10)),
    )
    _check(schedule, n_steps)
    return schedule


def _or(given: Number | None, usual: Number) -> Number:
    return usual if given is None else given


def _check(schedule: Schedule, n_steps: int) -> None:
    for name in ("warmup_steps", "decay_start", "sparsity_warmup_steps", "threshold_start"):
        if not 0 <= getattr(schedule, name) < n_steps:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(schedule, name)} is not between 0 and the {n_steps:,} steps of a run")
    if not 0 <= schedule.threshold_beta < 1:
        raise UserError(f"--threshold-beta {schedule.threshold_beta} is not between 0 and 1")
    if schedule.dead_tokens < 1:
        raise UserError(f"--dead-tokens {schedule.dead_tokens} is not positive")


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What the command line lists; a run is one value of each."""

    arch: tuple[str, ...]
    d_sae: tuple[int, ...]
    k: tuple[int, ...]
    masked_fraction: tuple[float, ...]
    corrupt: tuple[str, ...]
    seed: tuple[int, ...]
    penalty: tuple[str, ...] = ()
    lr: tuple[float, ...] = (3e-4,)
    match_strength: float | None = None

    @property
    def want_masked(self) -> bool:
        """Whether masked rows have to be read or measured."""
        return any(self.masked_fraction) or self.match_strength is not None


def make_runs(
    lists: Lists, schedule: Schedule, scale: Scale, masked_variant: str = DataConfig.masked_variant
) -> list[RunConfig]:
    """The product of the lists, each with a name. Architectures without a k appear once for all k.

    Raises UserError for an unknown name or a number out of range.
    """
    if lists.match_strength is not None and not any(text not in _NO_CORRUPTION for text in lists.corrupt):
        raise UserError("--match-strength sets the strength of a corruption; add one, such as --corrupt gaussian")
    corruptions = [_corruption(text, lists.match_strength, scale) for text in lists.corrupt or ("",)]
    runs = {}
    axes = (lists.arch, lists.d_sae, lists.k, lists.masked_fraction, corruptions, _penalty_sets(lists.penalty))
    for arch, d_sae, k, fraction, (corrupt, matched), penalties, lr, seed in product(*axes, lists.lr, lists.seed):
        if d_sae < 1:
            raise UserError(f"--d-sae {d_sae} is not positive")
        if not 0 <= fraction <= 1:
            raise UserError(f"--masked-fraction {fraction} is not between 0 and 1")
        if not 0 < lr < math.inf:
            raise UserError(f"--lr {lr} is not positive and finite")
        run = RunConfig(
            name="",
            arch=arch,
            d_sae=d_sae,
            k=k,
            seed=seed,
            masked_fraction=fraction,
            corrupt=corrupt,
            matched_fraction=matched,
            penalties=penalties,
            lr=lr,
            **dataclasses.asdict(schedule),
        )
        recipe = recipe_of(run)
        _try_penalties(run, recipe)
        run = dataclasses.replace(run, k=k if recipe.uses_k else 0)
        run = dataclasses.replace(run, name=_name(run, masked_variant, many_lr=len(lists.lr) > 1))
        runs[run.name] = run
    return list(runs.values())


def _corruption(text: str, match_strength: float | None, scale: Scale) -> tuple[str, float]:
    """A corruption with its strength, and the fraction it was matched to; "none" is none."""
    if text in _NO_CORRUPTION:
        return "", 0.0
    matched = 0.0
    if match_strength is not None:
        if not 0 < match_strength <= 1:
            raise UserError(f"--match-strength {match_strength} is not a masked fraction between 0 and 1")
        text, matched = matched_corruption(text, match_strength, scale), match_strength
    name, strength = parse_setting(text, "corruption (or leave out the number and add --match-strength)")
    apply = getattr(find("corruptions", name), name)
    apply(torch.zeros(1, 1), strength, torch.Generator())  # refuses a strength out of range
    return text, matched


def _try_penalties(run: RunConfig, recipe: Recipe) -> None:
    """Raises UserError for a negative coefficient; a penalty may refuse the activation, tried on one latent."""
    sae, zero = SparseAutoencoder(1, 1, recipe.activation), torch.zeros(1, 1)
    forward = Forward(f=zero, reconstructions=[zero], smallest=None)
    view = StepView(sae=sae, x=zero, target=zero, forward=forward, dead=None, sparsity_scale=0.0, k=1)
    for name, coefficient in penalties_of(run, recipe).items():
        if coefficient < 0:
            raise UserError(f"--penalty {name}={coefficient:g} is negative; give a coefficient of 0 or more")
        if coefficient:
            getattr(find("penalties", name), name)(view)


def _penalty_sets(texts: Iterable[str]) -> list[tuple[str, ...]]:
    """`l1=0.01, l1=0.02, auxk=0` -> the coefficients of a name are alternatives, different names go together."""
    by_name: dict[str, list[str]] = {}
    for text in texts:
        name, _ = parse_setting(text, "penalty")
        by_name.setdefault(name, []).append(text)
    return list(product(*by_name.values()))


def _name(run: RunConfig, variant: str, *, many_lr: bool) -> str:
    corrupt = run.corrupt.replace("=", "")
    if run.matched_fraction:
        to = "" if variant == DataConfig.masked_variant else f"_{variant}"
        corrupt = f"{run.corrupt.partition('=')[0]}_matched{to}{run.matched_fraction:g}"
    parts = [
        run.arch,
        f"d{run.d_sae}",
        f"k{run.k}" if run.k else "",
        *(text.replace("=", "") for text in run.penalties),
        f"lr{run.lr:g}" if many_lr else "",
        f"{variant}{run.masked_fraction:g}" if run.masked_fraction else "",
        corrupt,
        f"seed{run.seed}",
    ]
    return "_".join(part for part in parts if part)


def check_target(data: DataConfig, runs: Iterable[RunConfig], *, force: bool) -> None:
    """Raises UserError if an SAE would be asked for tokens it cannot see, which was measured to harm, unless forced."""
    kept = data.positions != "drop_masked" and any(run.masked_fraction for run in runs)
    if data.target == "clean" and kept and not force:
        raise UserError(
            "--target clean with masked positions asks the SAE for tokens it cannot see, which costs reconstruction "
            "and gains nothing; add --positions drop_masked, or --force to do it all the same"
        )
