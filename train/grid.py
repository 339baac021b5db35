"""From the lists of the command line to the runs: their product, each with a name."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch

from cache_spec.errors import UserError
from train.config import PRECISIONS, DataConfig, RunConfig
from train.mixing import rising_steps
from train.names import find, parse_setting, short_number
from train.scale import Scale, matched_corruption
from train.step import recipe_of, try_penalties
from train.timetable import Schedule

_NO_CORRUPTION = ("", "none")


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
    consistency: tuple[float, ...] = (0.0,)
    match_strength: float | None = None

    @property
    def want_masked(self) -> bool:
        """Whether masked rows have to be read or measured."""
        return any(self.masked_fraction) or any(self.consistency) or self.match_strength is not None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a grid share beside the schedule; each is a field of RunConfig, explained there."""

    masked_schedule: str = RunConfig.masked_schedule
    skip: bool = RunConfig.skip
    precision: str = RunConfig.precision
    beta1: float | None = RunConfig.beta1
    clip_norm: float | None = RunConfig.clip_norm
    decoder: str = RunConfig.decoder
    init_b_dec: str = RunConfig.init_b_dec
    aux_k: int = RunConfig.aux_k
    bandwidth: float = RunConfig.bandwidth
    resample_every: int = RunConfig.resample_every
    p_end: float | None = RunConfig.p_end
    p_updates: int = RunConfig.p_updates
    p_queue: int = RunConfig.p_queue
    calibrate: bool = RunConfig.calibrate


def make_runs(
    lists: Lists, schedule: Schedule, scale: Scale, data: DataConfig, settings: Settings | None = None
) -> list[RunConfig]:
    """The product of the lists, each with a name. Architectures without a k appear once for all k.

    Raises UserError for an unknown name or a number out of range.
    """
    if lists.match_strength is not None and not any(text not in _NO_CORRUPTION for text in lists.corrupt):
        raise UserError("--match-strength sets the strength of a corruption; add one, such as --corrupt gaussian")
    settings = settings or Settings()
    _check_settings(settings, data)
    corruptions = [_corruption(text, lists.match_strength, scale) for text in lists.corrupt or ("",)]
    runs = {}
    axes = (lists.arch, lists.d_sae, lists.k, lists.masked_fraction, corruptions, _penalty_sets(lists.penalty))
    shared = {**dataclasses.asdict(schedule), **dataclasses.asdict(settings)}
    for arch, d_sae, k, fraction, (corrupt, matched), penalties, lr, consistency, seed in product(
        *axes, lists.lr, lists.consistency, lists.seed
    ):
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
            consistency=consistency,
            **shared,
        )
        _check_numbers(run)
        recipe = recipe_of(run, transcoder=bool(data.target_hook))
        try_penalties(run, recipe)
        run = dataclasses.replace(run, k=k if recipe.uses_k else 0)
        run = dataclasses.replace(run, name=_name(run, data, many_lr=len(lists.lr) > 1))
        runs[run.name] = run
    return list(runs.values())


def _check_numbers(run: RunConfig) -> None:
    if run.d_sae < 1:
        raise UserError(f"--d-sae {run.d_sae} is not positive")
    if not 0 <= run.masked_fraction <= 1:
        raise UserError(f"--masked-fraction {run.masked_fraction} is not between 0 and 1")
    if not 0 < run.lr < math.inf:
        raise UserError(f"--lr {run.lr} is not positive and finite")
    if not 0 <= run.consistency < math.inf:
        raise UserError(f"--consistency {run.consistency} is not a finite weight of 0 or more")


def _check_settings(settings: Settings, data: DataConfig) -> None:
    known = {
        "decoder": ("", "unit", "free"),
        "init_b_dec": ("", "zero", "median", "mean"),
        "precision": ("", *PRECISIONS),
    }
    for name, values in known.items():
        if getattr(settings, name) not in values:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(settings, name)} is unknown; it is one of {', '.join(values[1:])}")
    rising_steps(settings.masked_schedule)
    if settings.skip and not data.target_hook:
        raise UserError("--skip gives a transcoder a linear path; add --target-hook, or leave --skip out")
    if settings.beta1 is not None and not 0 <= settings.beta1 < 1:
        raise UserError(f"--beta1 {settings.beta1} is not between 0 and 1")
    if settings.clip_norm is not None and not 0 <= settings.clip_norm < math.inf:
        raise UserError(f"--clip-norm {settings.clip_norm} is not a finite length of 0 or more")
    if not 0 < settings.bandwidth < math.inf:
        raise UserError(f"--bandwidth {settings.bandwidth} is not positive and finite")


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
    return f"{name}={short_number(strength)}", matched


def _penalty_sets(texts: Iterable[str]) -> list[tuple[str, ...]]:
    """`l1=0.01, l1=0.02, auxk=0` -> the coefficients of a name are alternatives, different names go together."""
    by_name: dict[str, list[str]] = {}
    for text in texts:
        name, coefficient = parse_setting(text, "penalty")
        by_name.setdefault(name, []).append(f"{name}={short_number(coefficient)}")
    return list(product(*(dict.fromkeys(alternatives) for alternatives in by_name.values())))


def _name(run: RunConfig, data: DataConfig, *, many_lr: bool) -> str:
    variant, corrupt = data.masked_variant, run.corrupt.replace("=", "")
    if run.matched_fraction:
        to = "" if variant == DataConfig.masked_variant else f"_{variant}"
        corrupt = f"{run.corrupt.partition('=')[0]}_matched{to}{short_number(run.matched_fraction)}"
    masked = f"{variant}{short_number(run.masked_fraction)}" if run.masked_fraction else ""
    if run.masked_schedule != "constant" and masked:
        masked += f"_{run.masked_schedule.replace('=', '')}"
    parts = [
        run.arch,
        f"to_{data.target_hook}" if data.target_hook else "",
        "skip" if run.skip else "",
        f"d{run.d_sae}",
        f"k{run.k}" if run.k else "",
        *(text.replace("=", "") for text in run.penalties),
        f"lr{short_number(run.lr)}" if many_lr else "",
        f"resample{run.resample_every}" if run.resample_every else "",
        masked,
        f"consistency{short_number(run.consistency)}" if run.consistency else "",
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
