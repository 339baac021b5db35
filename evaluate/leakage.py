"""Leakage: how much of its parent a child's latent writes, and how far a child suppresses its parent's latent."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluate.absorbed import mean_per_child
from evaluate.best_latent import best_latents
from evaluate.language import MIN_POSITIVES, Parents
from evaluate.latent_choice import to_labels
from evaluate.probes import one_hot
from evaluate.rows import class_labels
from evaluate.subject import Dictionary, Learned, Subject

MIN_F1 = 0.3  # of the best latent of a child: with less, it has none


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """One relation. n_children: children frequent enough to look for a latent. encoder: None without an encoder."""

    n_children: int
    n_with_latent: int
    full_absorption: float
    decoder: float
    encoder: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Children and their parents, all arrays [n_pairs].

    child, parent: values of their attributes. child_feature, parent_feature: their numbers among the features.
    child_latent, parent_latent: the latents with the best F1 on the fit text; child_usual, parent_usual: the values
    they usually have there. has_latent: the child's F1 is 0.3 or more.
    """

    child: np.ndarray
    parent: np.ndarray
    child_feature: np.ndarray
    parent_feature: np.ndarray
    child_latent: np.ndarray
    parent_latent: np.ndarray
    child_usual: np.ndarray
    parent_usual: np.ndarray
    has_latent: np.ndarray


def leakage(subject: Subject, parents: Parents) -> Leakage:
    """Ground-truth absorption of one relation, with latent(f) the latent of the best F1 for f on the fit text.

    Means over children, then over parents, of children whose best F1 is 0.3 or more:
    full_absorption: P(latent(p) = 0 and latent(c) > 0 | p on, c on) on the test text.
    decoder: least squares of the decoder row of latent(c), times the value it usually has on c, on the effects of c, p
    and whatever else c implies (`Truth.written`); the mean factor of p over the mean factor of c. A ratio of means,
    for the factor of c alone may be near 0. 1: the latents write as much of the parent as of the child.
    encoder: -<e_latent(p), E_c> / (usual value of latent(p) on p), E_c the effect of c, over all children. 1: the child
    alone silences its parent's latent. Only an SAE has an encoder direction; the oracle reads labels.
    """
    pairs = pairs_of(subject, parents)
    kept, parent = pairs.has_latent, pairs.parent[pairs.has_latent]
    own, other = _written(subject, pairs)
    absorbed = _absorbed(subject, parents, pairs)
    seen = kept & ~np.isnan(absorbed)
    own_mean = over_parents(own[kept], parent)
    suppressed = _suppressed(subject, pairs)
    return Leakage(
        n_children=len(kept),
        n_with_latent=int(kept.sum()),
        full_absorption=over_parents(absorbed[seen], pairs.parent[seen]),
        decoder=over_parents(other[kept], parent) / own_mean if own_mean else 0.0,
        encoder=None if suppressed is None else over_parents(suppressed, pairs.parent),
    )


def pairs_of(subject: Subject, parents: Parents) -> Pairs:
    """The children of usable parents that are on in 20 or more rows of the fit text, with everybody's latents."""
    language, relation = subject.bench.language, parents.relation
    assert language is not None
    rows, parent_of_row = class_labels(language.fit, relation.parent, relation.positions)
    child_of_row = language.fit.attributes[relation.child][rows].astype(np.int64)
    latents = subject.latents(language.fit)[to_labels(rows, language.fit.x)]
    usable = (child_of_row >= 0) & np.isin(parent_of_row, parents.classes)
    child, first, n_rows = np.unique(child_of_row[usable], return_index=True, return_counts=True)
    child, parent = child[n_rows >= MIN_POSITIVES], parent_of_row[usable][first][n_rows >= MIN_POSITIVES]
    best_child = best_latents(latents, to_labels(one_hot(child_of_row, child), latents).T)
    best_parent = best_latents(latents, to_labels(one_hot(parent_of_row, parents.classes), latents).T)
    place = np.searchsorted(parents.classes, parent)
    names, number = language.value_names, language.truth.number
    return Pairs(
        child=child,
        parent=parent,
        child_feature=np.array([number[f"{relation.child} {names[relation.child][c]}"] for c in child], dtype=int),
        parent_feature=np.array([number[f"{relation.parent} {names[relation.parent][p]}"] for p in parent], dtype=int),
        child_latent=best_child.number.cpu().numpy(),
        parent_latent=best_parent.number.cpu().numpy()[place],
        child_usual=best_child.usual.cpu().numpy(),
        parent_usual=best_parent.usual.cpu().numpy()[place],
        has_latent=(best_child.f1 >= MIN_F1).cpu().numpy(),
    )


def _absorbed(subject: Subject, parents: Parents, pairs: Pairs) -> np.ndarray:
    """P(latent(p) = 0 and latent(c) > 0 | c on) on the test text, [n_pairs]; nan for a child that is never on there."""
    language, relation = subject.bench.language, parents.relation
    assert language is not None
    rows, _ = class_labels(language.test, relation.parent, relation.positions)
    child_of_row = language.test.attributes[relation.child][rows]
    on = (subject.latents(language.test)[to_labels(rows, language.test.x)] != 0).cpu().numpy()
    rates = np.full(len(pairs.child), np.nan)
    for i, (child, own, parent) in enumerate(zip(pairs.child, pairs.child_latent, pairs.parent_latent, strict=True)):
        here = on[child_of_row == child]
        if len(here):
            rates[i] = (~here[:, parent] & here[:, own]).mean()
    return rates


def _written(subject: Subject, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """How much of the child, and of the parent, the child's latent usually writes: two arrays [n_pairs]."""
    language, directions = subject.bench.language, subject.dictionary.directions
    assert language is not None
    factors = [
        language.truth.written(directions[latent] * float(usual), int(own), int(other))
        for latent, usual, own, other in zip(
            pairs.child_latent, pairs.child_usual, pairs.child_feature, pairs.parent_feature, strict=True
        )
    ]
    return np.array([factor.own for factor in factors]), np.array([factor.other for factor in factors])


def _suppressed(subject: Subject, pairs: Pairs) -> np.ndarray | None:
    """How far a child lowers its parent's latent, as a share of its usual value, [n_pairs]; None without an encoder."""
    encoder, language = encoder_directions(subject.dictionary), subject.bench.language
    if encoder is None:
        return None
    assert language is not None
    effects = language.truth.effects[torch.from_numpy(pairs.child_feature).to(encoder.device)]
    rows = encoder[torch.from_numpy(pairs.parent_latent).to(encoder.device)].double()
    return -(rows * effects).sum(1).cpu().numpy() / np.maximum(pairs.parent_usual, 1e-12)


def encoder_directions(dictionary: Dictionary) -> Tensor | None:
    """[d_sae, d_model]: how each latent reads an activation (of a gated SAE, its gate); None for what is not an SAE."""
    return dictionary.sae.W_enc.detach().T if isinstance(dictionary, Learned) else None


def over_parents(values: np.ndarray, parent: np.ndarray) -> float:
    """Mean of [n_pairs] over the children of each parent, then over parents; 0 where there are none."""
    return float(mean_per_child(values, parent).mean()) if len(values) else 0.0
