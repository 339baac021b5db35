"""The tensors of a step, and what to read for each: no row in a view that no mixture takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache_spec.plan import HookPlan
from train.config import DataConfig
from train.mixing import Need
from train.staging import Segment


@dataclass(frozen=True)
class View:
    """One tensor: of each variant the rows from one place in the order of masking on, up to another."""

    hook: HookPlan
    parts: tuple[tuple[str, int, int], ...]


def views_of(need: Need, data: DataConfig, hook: HookPlan, target_hook: HookPlan) -> list[View]:
    """At each hook point one tensor if each row is wanted in one view, else one of clean and one of masked rows."""
    clean_from, target = need.clean_from, []
    if data.target_hook:
        wanted = need if data.target == "self" else Need(clean_from=0, masked_to=0)
        target = _views_at(target_hook, data, wanted.clean_from, wanted.masked_to)
    elif data.target == "clean":
        clean_from = 0
    return [*_views_at(hook, data, clean_from, need.masked_to), *target]


def _views_at(hook: HookPlan, data: DataConfig, clean_from: int, masked_to: int) -> list[View]:
    clean, masked = ("clean", clean_from, data.batch_size), (data.masked_variant, 0, masked_to)
    if not masked_to:
        return [View(hook, (clean,))]
    if clean_from == masked_to:
        return [View(hook, (masked, clean))]
    return [View(hook, (clean,)), View(hook, (masked,))]


def segments_of(view: View, shards: Sequence[int], inside: Sequence[np.ndarray], rank: np.ndarray) -> Iterator[Segment]:
    """What to read for a view. `inside` are the rows of each piece of the step, `rank` [batch] their places in the
    order of masking, which rise in every piece."""
    for variant, low, high in view.parts:
        at = 0
        for shard, rows in zip(shards, inside, strict=True):
            start, end = np.searchsorted(rank[at : at + len(rows)], (low, high)).tolist()
            if start < end:
                yield Segment((view.hook.name, variant, shard), rows[start:end], at + start)
            at += len(rows)
