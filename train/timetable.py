"""When things begin and end in a run: the published schedule, scaled down where a run is short."""

from dataclasses import dataclass
from typing import TypeVar

from cache_spec.errors import UserError
from train.loader import MixedBatchLoader

FULL_WINDOW = 1000  # steps, from dictionary_learning; a short run gets 5 % of its steps instead
FULL_DEAD_TOKENS = 10_000_000
MIN_STEPS = 20
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things begin and end, in steps (dead_tokens in tokens)."""

    warmup_steps: int
    decay_start: int
    sparsity_warmup_steps: int
    anneal_start: int
    threshold_start: int
    threshold_beta: float
    dead_tokens: int


def schedule_for(
    loader: MixedBatchLoader,
    *,
    warmup_steps: int | None = None,
    decay_start: int | None = None,
    sparsity_warmup_steps: int | None = None,
    anneal_start: int | None = None,
    threshold_start: int | None = None,
    threshold_beta: float | None = None,
    dead_tokens: int | None = None,
) -> Schedule:
    """dictionary_learning's schedule, scaled down for short runs, with what is given put in.

    Warm-up 1000 steps, sparsity warm-up 5000, p annealed from step 10,000, threshold from step 1000 with beta 0.999:
    all follow from a window of 1000 steps, or of 5 % of the steps if that is less. Dead after 10M tokens, or after
    10 % of all. Decay over the last fifth. Raises UserError for a run of fewer than 20 steps, or a value that does not
    fit.
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
        anneal_start=_or(anneal_start, 10 * window),
        threshold_start=_or(threshold_start, window),
        threshold_beta=_or(threshold_beta, 1 - 1 / window),
        dead_tokens=_or(dead_tokens, min(FULL_DEAD_TOKENS, n_steps * batch_size // 10)),
    )
    _check(schedule, n_steps)
    return schedule


def _or(given: Number | None, usual: Number) -> Number:
    return usual if given is None else given


def _check(schedule: Schedule, n_steps: int) -> None:
    for name in ("warmup_steps", "decay_start", "sparsity_warmup_steps", "anneal_start", "threshold_start"):
        if not 0 <= getattr(schedule, name) < n_steps:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(schedule, name)} is not between 0 and the {n_steps:,} steps of a run")
    if not 0 <= schedule.threshold_beta < 1:
        raise UserError(f"--threshold-beta {schedule.threshold_beta} is not between 0 and 1")
    if schedule.dead_tokens < 1:
        raise UserError(f"--dead-tokens {schedule.dead_tokens} is not positive")
