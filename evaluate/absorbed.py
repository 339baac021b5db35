"""What became of the tokens of a parent: its own latents fire, another carries its direction, or nothing shows it."""

from dataclasses import dataclass

import numpy as np
import torch

from evaluate.language import Parents
from evaluate.latent_choice import main_latents, to_labels
from evaluate.projection import absorbed
from evaluate.subject import Subject

MIN_WITHOUT_CHILD = 20  # tokens of a parent without a child, for the recall gap
MIN_SHOWN = 0.5  # share of a parent's tokens that a dictionary must show, for the parent to count as represented


@dataclass(frozen=True, kw_only=True, eq=False)
class ParentTokens:
    """Every test token where the parent is on and its dense probe is right, all arrays [n].

    absorber: the latent with the largest projection on the parent's direction besides the main ones.
    """

    full_absorption: np.ndarray
    absorption_fraction: np.ndarray
    silent: np.ndarray
    absorber: np.ndarray
    child: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ParentRates:
    """The same as rates: means over the tokens of a child, then over children. recall_gap: None where there is none."""

    full_absorption: float
    absorption_fraction: float
    silent: float
    recall_gap: float | None

    @property
    def represented(self) -> bool:
        """Whether the dictionary shows the parent: on half of its tokens a main latent is on, or it is absorbed.

        Absorbed tokens count as shown, so that a parent does not drop out because it is absorbed.
        """
        return 1 - (self.silent - self.full_absorption) >= MIN_SHOWN


def latents_of_parents(subject: Subject, parents: Parents) -> tuple[list[np.ndarray], np.ndarray]:
    """The main latents of every parent of a relation, chosen on the fit text, and the F1 [n_parents] of a probe."""
    language = subject.bench.language
    assert language is not None
    latents = subject.latents(language.fit)
    return main_latents(latents[to_labels(parents.fit.rows, latents)], to_labels(parents.fit.labels, latents))


def parent_latents(subject: Subject, parents: Parents) -> list[np.ndarray]:
    """The main latents alone."""
    return latents_of_parents(subject, parents)[0]


def tokens_of_parent(subject: Subject, parents: Parents, i: int, main: np.ndarray) -> ParentTokens:
    """Measure parent number `i` of a relation, whose main latents are `main`, on the test text."""
    language = subject.bench.language
    assert language is not None
    right = np.flatnonzero(parents.right[i])
    rows = to_labels(parents.rows[right], language.test.x)
    latents = subject.latents(language.test)[rows]
    direction = parents.directions[i]
    along = subject.dictionary.directions @ direction  # [d_sae]
    own = torch.zeros(latents.shape[1], dtype=torch.bool, device=latents.device)
    own[to_labels(main, latents)] = True
    found = absorbed(
        latents,
        own,
        along=along,
        cosine=along / subject.dictionary.directions.norm(dim=1).clamp(min=1e-12),
        total=(language.test.x[rows] - subject.dictionary.offset) @ direction,
    )
    return ParentTokens(
        full_absorption=found.full,
        absorption_fraction=found.fraction,
        silent=found.silent,
        absorber=found.absorber,
        child=parents.child[right],
    )


def rates_of(tokens: ParentTokens) -> ParentRates | None:
    """None for a parent that never has a child where it is read."""
    with_child, without = tokens.child >= 0, tokens.child < 0
    if not with_child.any():
        return None

    def rate(values: np.ndarray) -> float:
        return float(mean_per_child(values[with_child], tokens.child[with_child]).mean())

    silent = rate(tokens.silent)
    enough = without.sum() >= MIN_WITHOUT_CHILD
    return ParentRates(
        full_absorption=rate(tokens.full_absorption),
        absorption_fraction=rate(tokens.absorption_fraction),
        silent=silent,
        recall_gap=silent - float(tokens.silent[without].mean()) if enough else None,
    )


def mean_per_child(values: np.ndarray, child: np.ndarray) -> np.ndarray:
    """Mean of [n] values over the tokens of each child that occurs: [n_children], in rising order of the child."""
    _, number = np.unique(child, return_inverse=True)
    return np.bincount(number, weights=values) / np.bincount(number)
