"""A worked example of absorption: one parent, and how often its own latents fire on each of its children."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evaluate.absorbed import ParentTokens, mean_per_child, parent_latents, tokens_of_parent
from evaluate.language import EVERYWHERE, Language, Parents
from evaluate.probes import f1_score
from evaluate.subject import Subject

MAX_CHILDREN = 24


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One child: tokens seen, share on which the parent's latents fire, full absorption, and by which latent."""

    child: str
    n: int
    firing: float
    absorbed: float
    absorber: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """The recall holes of one parent in one SAE; `latents` are the ones that stand for the parent."""

    family: str
    parent: str
    latents: tuple[int, ...]
    bars: tuple[Bar, ...]


def example_of(facts: Mapping[str, Any]) -> Example:
    """An example from its fields as JSON has them."""
    bars = tuple(Bar(**bar) for bar in facts["bars"])
    return Example(**{**facts, "latents": tuple(facts["latents"]), "bars": bars})


def recall_example(subject: Subject) -> Example:
    """Measure the parent that this SAE absorbs most.

    Another SAE would look better on that very parent by the choice alone, so examples are not for comparing recipes.
    """
    language = subject.bench.language
    assert language is not None
    best: tuple[float, Parents, int, np.ndarray, ParentTokens] | None = None
    for parents in language.parents:
        for i, latents in enumerate(parent_latents(subject, parents)):
            tokens = tokens_of_parent(subject, parents, i, latents)
            with_child = tokens.child >= 0
            if not with_child.any():
                continue
            rate = float(mean_per_child(tokens.full_absorption[with_child], tokens.child[with_child]).mean())
            if best is None or rate > best[0]:
                best = (rate, parents, i, latents, tokens)
    assert best is not None, "absorption was measured, so there is a parent"
    _, parents, i, latents, tokens = best
    relation, value = parents.relation, int(parents.classes[i])
    return Example(
        family=relation.family,
        parent=f"{relation.parent} {language.value_names[relation.parent][value]}",
        latents=tuple(int(latent) for latent in latents),
        bars=_bars(subject, language, tokens, language.value_names[relation.child]),
    )


def _bars(subject: Subject, language: Language, tokens: ParentTokens, names: object) -> tuple[Bar, ...]:
    bars = []
    for child in np.unique(tokens.child[tokens.child >= 0]):
        here = tokens.child == child
        absorbed = tokens.full_absorption[here] > 0
        absorber = ""
        if absorbed.any():
            absorber = describe(subject, language, int(np.bincount(tokens.absorber[here][absorbed]).argmax()))
        bars.append(
            Bar(
                child=names[child],  # pyright: ignore[reportIndexIssue]
                n=int(here.sum()),
                firing=1 - float(tokens.silent[here].mean()),
                absorbed=float(absorbed.mean()),
                absorber=absorber,
            )
        )
    most_seen = sorted(bars, key=lambda bar: -bar.n)[:MAX_CHILDREN]
    return tuple(sorted(most_seen, key=lambda bar: (bar.firing, -bar.n)))


def describe(subject: Subject, language: Language, latent: int) -> str:
    """A latent by its number and the ground-truth feature it predicts best (F1 on an even sample of test tokens)."""
    assert language.test.features is not None
    rows = np.flatnonzero(language.test.positions[EVERYWHERE])
    on = (subject.latents(language.test)[torch.from_numpy(rows), latent] != 0).cpu().numpy()
    features = language.test.features[rows].T
    f1 = f1_score(np.broadcast_to(on, features.shape), features)
    return f"latent {latent} ({language.feature_names[int(f1.argmax())]}, F1 {f1.max():.2f})"
