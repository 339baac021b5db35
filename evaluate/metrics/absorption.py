"""absorption: how often a parent's own latent stays silent because a child's latent has taken over its direction."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluate.columns import Column
from evaluate.language import Parents
from evaluate.latent_choice import main_latents, to_labels
from evaluate.subject import Subject

MIN_COSINE_FULL = 0.025
MIN_COSINE_FRACTION = 0.1
MIN_SHARE = 0.4
MAX_ABSORBERS = 3
MIN_WITHOUT_CHILD = 20  # tokens of a parent without a child, for the recall gap
FAMILIES = ("same_token", "two_token", "cross_token")
WITHOUT_CHILD = ("cross_token",)  # families whose parent also occurs without a child: a topic before its hero is named
_QUANTITIES = {
    "full_absorption": "the parent's latents are all off and one aligned latent carries at least 40 % of it",
    "absorption_fraction": "share of the parent's direction carried by up to three other latents",
    "silent": "the parent's latents are all off although it is there: the size of the recall hole",
    "recall_gap": "P(parent's latents off | parent with a child) - P(off | parent without one)",
}
_SHORT = {"full_absorption": "abs", "recall_gap": "gap"}


def _columns() -> dict[str, Column]:
    columns = {
        "mean_full_absorption_score": Column(
            meaning="full absorption, mean over families", better="lower", oracle_is_best=True
        ),
        "mean_absorption_fraction_score": Column(
            meaning="absorption fraction, mean over families", better="lower", oracle_is_best=True
        ),
        "mean_num_split_features": Column(meaning="latents that stand for one parent, mean over parents"),
    }
    for family in FAMILIES:
        columns[f"main_latent_f1_{family}"] = Column(
            meaning=f"{family.replace('_', ' ')}: F1 of a probe on a parent's latents, fit text, mean over parents",
            better="higher",
            oracle_is_best=True,
        )
    for quantity, words in _QUANTITIES.items():
        for family in WITHOUT_CHILD if quantity == "recall_gap" else FAMILIES:
            columns[f"{quantity}_{family}"] = Column(
                meaning=f"{family.replace('_', ' ')}: {words}",
                better="lower",
                oracle_is_best=True,
                short=f"{_SHORT[quantity]} {family.split('_')[0]}" if quantity in _SHORT else "",
                terminal=quantity == "full_absorption",
            )
    return columns


NEEDS_LANGUAGE = True
COLUMNS = _columns()


def absorption(subject: Subject) -> dict[str, float]:
    """Absorption of every parent of every relation, against ground truth, per family.

    The parent's direction is a dense class-balanced logistic probe; its latents are `latent_choice.main_latents`. On
    test tokens where parent and child are on and the dense probe is right (SAEBench absorption, arXiv 2409.14507 and
    2503.09532, with (x - b_dec) projected instead of x):
    full: all main latents are 0, and the latent with the largest a_j d_j.w has cosine >= 0.025 and carries >= 40 % of
    (x - b_dec).w > 0. fraction: the three largest others with cosine >= 0.1, if together >= 40 % of the projection,
    absorb A = min(theirs, what the main ones leave) of A + main. silent: all main latents are 0.
    Rates are means over tokens of a child, then over children, then over parents. recall_gap per parent is the mean
    over children of P(silent) minus P(silent) where the parent is on without a child, in the families where it occurs
    so: of the embedded language's, cross_token alone.
    main_latent_f1 is the mean over parents of the F1, on fit text, of a logistic probe on their main latents. One
    latent is always main, however badly it fits, as in SAEBench, whose protocol has no bar: a low F1 (a latent of one
    noun, say) means splitting or absence rather than absorption, though much absorption lowers it too.
    """
    language = subject.bench.language
    assert language is not None
    found: dict[str, dict[str, float]] = {}
    n_main: list[int] = []
    for parents in language.parents:
        main, f1 = _main_latents(subject, parents)
        n_main += [len(latents) for latents in main]
        found[parents.relation.family] = {"main_latent_f1": float(f1.mean()), **_relation(subject, parents, main)}
    values = {f"{quantity}_{family}": value for family, rates in found.items() for quantity, value in rates.items()}
    if found:
        values["mean_full_absorption_score"] = float(np.mean([rates["full_absorption"] for rates in found.values()]))
        values["mean_absorption_fraction_score"] = float(
            np.mean([rates["absorption_fraction"] for rates in found.values()])
        )
        values["mean_num_split_features"] = float(np.mean(n_main))
    return values


def parent_latents(subject: Subject, parents: Parents) -> list[np.ndarray]:
    """The main latents of every parent of a relation, chosen on the fit text."""
    return _main_latents(subject, parents)[0]


def _main_latents(subject: Subject, parents: Parents) -> tuple[list[np.ndarray], np.ndarray]:
    latents = subject.latents("fit")
    return main_latents(latents[to_labels(parents.fit.rows, latents)], to_labels(parents.fit.labels, latents))


def _relation(subject: Subject, parents: Parents, main: list[np.ndarray]) -> dict[str, float]:
    """The rates, type-weighted over children and then over parents."""
    per_parent: dict[str, list[float]] = {quantity: [] for quantity in _QUANTITIES}
    for i, latents in enumerate(main):
        tokens = tokens_of_parent(subject, parents, i, latents)
        with_child, without = tokens.child >= 0, tokens.child < 0
        if not with_child.any():
            continue
        by_child = {
            name: mean_per_child(getattr(tokens, name)[with_child], tokens.child[with_child])
            for name in ("full_absorption", "absorption_fraction", "silent")
        }
        for name, rates in by_child.items():
            per_parent[name].append(float(rates.mean()))
        if parents.relation.family in WITHOUT_CHILD and without.sum() >= MIN_WITHOUT_CHILD:
            per_parent["recall_gap"].append(float(by_child["silent"].mean() - tokens.silent[without].mean()))
    return {quantity: float(np.mean(values)) for quantity, values in per_parent.items() if values}


def mean_per_child(values: np.ndarray, child: np.ndarray) -> np.ndarray:
    """Mean of [n] values over the tokens of each child that occurs: [n_children], in rising order of the child."""
    _, number = np.unique(child, return_inverse=True)
    return np.bincount(number, weights=values) / np.bincount(number)


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


def tokens_of_parent(subject: Subject, parents: Parents, i: int, main: np.ndarray) -> ParentTokens:
    """Measure parent number `i` of a relation, whose main latents are `main`, on the test text."""
    language = subject.bench.language
    assert language is not None
    right = np.flatnonzero(parents.right[i])
    rows = to_labels(parents.rows[right], language.test.x)
    latents = subject.latents("test")[rows]
    direction = parents.directions[i]
    along = subject.dictionary.directions @ direction  # [d_sae]
    cosine = along / subject.dictionary.directions.norm(dim=1).clamp(min=1e-12)
    total = (language.test.x[rows] - subject.dictionary.offset) @ direction  # [n]

    own = torch.zeros(latents.shape[1], dtype=torch.bool, device=latents.device)
    own[to_labels(main, latents)] = True
    silent = (latents[:, own] == 0).all(1)
    carried = latents * along
    main_part = carried[:, own].sum(1)
    others = carried.masked_fill(own, float("-inf"))
    top = others.max(1)
    full = silent & (cosine[top.indices] >= MIN_COSINE_FULL) & (total > 0) & (top.values >= MIN_SHARE * total)
    return ParentTokens(
        full_absorption=full.double().cpu().numpy(),
        absorption_fraction=_fraction(others, cosine, main_part, total).double().cpu().numpy(),
        silent=silent.double().cpu().numpy(),
        absorber=top.indices.cpu().numpy(),
        child=parents.child[right],
    )


def _fraction(others: Tensor, cosine: Tensor, main_part: Tensor, total: Tensor) -> Tensor:
    """SAEBench 0.6 absorption fraction, [n]: `others` [n, d_sae] is what each latent but the main ones carries."""
    aligned = others.masked_fill(cosine < MIN_COSINE_FRACTION, float("-inf")).clamp(min=0)
    absorbed = aligned.topk(min(MAX_ABSORBERS, aligned.shape[1]), dim=1).values.sum(1)
    left = (total - main_part).clamp(min=0)
    taken = torch.minimum(absorbed, left)
    fraction = torch.where(main_part <= 0, torch.ones_like(total), taken / (taken + main_part).clamp(min=1e-12))
    counts = (total > 0) & (main_part < total) & (absorbed >= MIN_SHARE * total)
    return torch.where(counts, fraction, torch.zeros_like(fraction))
