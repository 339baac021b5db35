"""Masked language: the embedded language's text, clean and masked, and what the activations of each still hold.

The paper says that masking weakens the co-activation of parents and children in the data, and did not measure it. Here
it is measured, with no dictionary in between: a dense probe says whether an activation holds its token's own parent,
another whether it holds its own child.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cache_spec.hook_point import HookPoint
from cache_spec.seeds import derive_seed
from evaluate.language import MIN_POSITIVES, Language, Parents
from evaluate.probes import Standard, fit_logistic
from evaluate.rows import Rows
from evaluate.store import Store
from evaluate.windows import Source
from harvest import embedded
from harvest.model import LoadedModel

N_DOCUMENTS = 1000
CHILD_ROWS = 1024  # rows that one child's probe is fitted on, at most half of them its own
CHILD_BATCH = 16  # probes fitted at once
VARIANTS = ("clean", "masked", "kept")


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedLanguage:
    """Aligned rows of the same tokens in the clean and in the masked text, at the positions of the relations.

    clean, masked: their labels are those of the clean text. replaced: [n], true where the row's own token was replaced.
    language: whose fit text probes are fitted on, and whose test text they are calibrated on.
    """

    clean: Rows
    masked: Rows
    replaced: np.ndarray
    language: Language

    @cached_property
    def pairs(self) -> tuple["Pairs", ...]:
        """The rows of every relation that has usable parents, with a dense probe for every parent and child."""
        found = [_pairs(self, known) for known in self.language.parents]
        return tuple(pairs for pairs in found if len(pairs.rows) and len(pairs.children.classes))

    @cached_property
    def coactivation(self) -> dict[str, float]:
        """`{quantity}_{family}_{clean, masked or kept}` of the activations themselves: the same for every dictionary.

        An activation holds its own parent if the dense probe of that parent (Language.parents) reads it, at the
        threshold where as many clean test tokens are read as have the parent; likewise the child. A class that is read
        but is not the token's own counts for nothing. The probes are fitted on clean text, so what masked text holds in
        another form than clean text does passes for lost.
        """
        held = {"clean": self.clean.x, "masked": self.masked.x}
        values: dict[str, float] = {}
        for pairs in self.pairs:
            rows = torch.from_numpy(pairs.rows).to(self.clean.x.device)
            reads = {
                variant: (pairs.parents.holds(x[rows], pairs.parent), pairs.children.holds(x[rows], pairs.child))
                for variant, x in held.items()
            }
            values |= by_variant(pairs, reads, self.replaced)
        return values


def make_masked_language(
    loaded: LoadedModel,
    hook_point: HookPoint,
    language: Language,
    *,
    seed: int,
    mask_token: int,
    mask_prob: float,
    store: Store,
) -> MaskedLanguage:
    """Write text of the language, replace each token that is not special with probability `mask_prob`, and run both."""
    corpus = embedded.generate(N_DOCUMENTS, derive_seed("evaluate/masked language/text", seed))
    generator = np.random.default_rng(derive_seed("evaluate/masked language/mask", seed))
    special = np.isin(corpus.tokens, loaded.special_ids)
    replaced = (generator.random(corpus.tokens.shape) < mask_prob) & ~special
    places = {relation.positions: corpus.positions[relation.positions] for relation in language.relations}
    keep = np.any(list(places.values()), axis=0)
    source = Source(loaded=loaded, hook_point=hook_point, store=store)
    clean = Rows(
        x=source.rows("masked-language-clean", corpus.tokens, keep),
        attributes={name: values[keep] for name, values in corpus.attributes.items()},
        positions={name: chosen[keep] for name, chosen in places.items()},
    )
    masked = np.where(replaced, mask_token, corpus.tokens)
    return MaskedLanguage(
        clean=clean,
        masked=replace(clean, x=source.rows("masked-language-masked", masked, keep)),
        replaced=replaced[keep],
        language=language,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """Which of its classes an activation holds: one direction and one threshold for each class.

    classes: [n_classes] rising. directions: [n_classes, d_model]. threshold: [n_classes], the lowest score that counts.
    """

    classes: np.ndarray
    directions: Tensor
    threshold: Tensor

    @classmethod
    def calibrated(cls, classes: np.ndarray, directions: Tensor, x: Tensor, values: np.ndarray) -> "Reader":
        """Thresholds at which as many of the rows [n, d_model] are read as have the class, by their values [n].

        Between the lowest score that is read and the highest that is not lies a gap, wide where a class is separable,
        and the threshold is its middle: at its edge the least displacement would look like forgetting.
        """
        scores = (x @ directions.T).sort(dim=0, descending=True).values  # [n, n_classes]
        n_on = torch.from_numpy((values[:, None] == classes).sum(0)).to(x.device)
        assert bool(((n_on > 0) & (n_on < len(x))).all()), "a class that is on in no row, or in all, has no threshold"
        read, unread = (scores.gather(0, number.unsqueeze(0)).squeeze(0) for number in (n_on - 1, n_on))
        return cls(classes=classes, directions=directions, threshold=(read + unread) / 2)

    def number(self, values: np.ndarray) -> np.ndarray:
        """Where in `classes` each value of [n] is; 0 for -1, which is none."""
        return np.searchsorted(self.classes, np.maximum(values, self.classes[0]))

    def holds(self, x: Tensor, values: np.ndarray) -> np.ndarray:
        """[n, d_model] and each row's own class [n] (-1 for none) -> [n], whether the row holds it."""
        number = torch.from_numpy(self.number(values)).to(x.device)
        score = (x * self.directions[number]).sum(1)
        return (score >= self.threshold[number]).cpu().numpy() & (values >= 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """The rows of one relation: row numbers [n] with the parent and the child of each, [n], -1 for no child.

    Only parents with a good dense probe are here, and children of theirs that are frequent enough. known: the parents,
    with the rows that latents are chosen on. parents, children: the probes. owner: [n_children], each one's parent.
    """

    known: Parents
    rows: np.ndarray
    parent: np.ndarray
    child: np.ndarray
    parents: Reader
    children: Reader
    owner: np.ndarray


def _pairs(masked: MaskedLanguage, known: Parents) -> Pairs:
    language, relation = masked.language, known.relation
    x, x_test = language.fit.x[known.fit.rows], language.test.x[known.rows]
    fitted = language.fit.attributes[relation.child][known.fit.rows].astype(np.int64)
    children = np.intersect1d(_frequent(fitted), _frequent(known.child))
    first = known.fit.rows[(fitted[:, None] == children).argmax(0)]  # a row of each child
    owner = language.fit.attributes[relation.parent][first].astype(np.int64)
    usable = np.isin(owner, known.classes)
    children, owner = children[usable], owner[usable]

    purpose = f"{relation.family}/{relation.parent}/{relation.child}"
    generator = np.random.default_rng(derive_seed("evaluate/masked language/probe rows", language.seed, purpose))
    parent, child = (masked.clean.attributes[name].astype(np.int64) for name in (relation.parent, relation.child))
    rows = np.flatnonzero(
        masked.clean.positions[relation.positions]
        & np.isin(parent, known.classes)
        & ((child < 0) | np.isin(child, children))
    )
    tested = language.test.attributes[relation.parent][known.rows].astype(np.int64)
    directions = _child_directions(x, fitted, children, generator)
    return Pairs(
        known=known,
        rows=rows,
        parent=parent[rows],
        child=child[rows],
        parents=Reader.calibrated(known.classes, known.directions, x_test, tested),
        children=Reader.calibrated(children, directions, x_test, known.child),
        owner=owner,
    )


def _frequent(values: np.ndarray) -> np.ndarray:
    """The values of [n] that at least MIN_POSITIVES rows have, and as many have not; -1 is none."""
    found, counts = np.unique(values[values >= 0], return_counts=True)
    return found[np.minimum(counts, len(values) - counts) >= MIN_POSITIVES]


def _child_directions(x: Tensor, child: np.ndarray, children: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Class-balanced logistic probes of all children, as directions [n_children, d_model].

    There are hundreds, so each is fitted on a sample that holds all its own rows up to a half, and all samples are of
    one size, so that many are fitted at once.
    """
    standard, n_rows = Standard.of(x), min(CHILD_ROWS, len(x))
    features, directions = standard.apply(x), []
    for some in np.split(children, range(CHILD_BATCH, len(children), CHILD_BATCH)):
        chosen = np.stack([_sample(child == value, n_rows, generator) for value in some])  # [batch, n_rows]
        labels = torch.from_numpy(child[chosen] == some[:, None]).to(x.device)
        weights = fit_logistic(features[torch.from_numpy(chosen).to(x.device)], labels)
        directions.append((weights[:, :-1] / standard.std).to(x.dtype))
    return torch.cat(directions) if directions else x[:0]


def _sample(own: np.ndarray, n_rows: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers of `n_rows` rows: those of the class, thinned to a half if they are more, and others."""
    inside, outside = np.flatnonzero(own), np.flatnonzero(~own)
    n_inside = max(min(len(inside), n_rows // 2), n_rows - len(outside))
    picked = [
        generator.choice(inside, n_inside, replace=False),
        generator.choice(outside, n_rows - n_inside, replace=False),
    ]
    return np.sort(np.concatenate(picked))


def by_variant(
    pairs: Pairs, reads: Mapping[str, tuple[np.ndarray, np.ndarray]], replaced: np.ndarray
) -> dict[str, float]:
    """`{quantity}_{family}_{variant}` from what is held per row of the clean and of the masked text.

    reads: "clean" and "masked" -> whether the parent and whether the child is held, bool [n] each. "kept" are the
    masked text's rows whose own token was not replaced.
    """
    everything, kept = np.ones(len(pairs.rows), dtype=bool), ~replaced[pairs.rows]
    chosen = {"clean": ("clean", everything), "masked": ("masked", everything), "kept": ("masked", kept)}
    values: dict[str, float] = {}
    for variant, (text, rows) in chosen.items():
        held_parent, held_child = reads[text]
        found = coactivation(held_parent[rows], held_child[rows], pairs.parent[rows], pairs.child[rows])
        values |= {f"{name}_{pairs.known.relation.family}_{variant}": value for name, value in found.items()}
    return values


def coactivation(
    held_parent: np.ndarray, held_child: np.ndarray, parent: np.ndarray, child: np.ndarray
) -> dict[str, float]:
    """How parents and children go together, from per-row facts, all [n]; a quantity without data is left out.

    held_parent, held_child: whether the row holds its own parent and its own child. parent, child: which they are, -1
    for none.
    child_given_parent: rows of a parent that hold both / rows that hold the parent, so a row that has no child counts
    against it. parent_given_child: both / rows that hold the child. Tokens count as often as they occur, since a
    dictionary is trained on tokens; parents count alike.
    phi: Pearson correlation over all rows of "holds its parent, which is p" and "holds its child, which is c", mean
    over the children of a parent, then over parents.
    parent_rate: share of rows that hold their parent; child_rate: share of rows with a child that hold it.
    """
    held_child = held_child & (child >= 0)
    given_parent, given_child, phi = [], [], []
    for p in np.unique(parent):
        here = parent == p
        a, both = held_parent & here, held_parent & held_child & here
        given_parent += [both.sum() / a.sum()] if a.any() else []
        given_child += [both.sum() / (held_child & here).sum()] if (held_child & here).any() else []
        values = [_phi(a, held_child & (child == c)) for c in np.unique(child[here & (child >= 0)])]
        values = [value for value in values if value is not None]
        phi += [np.mean(values)] if values else []
    found = {
        "child_given_parent": given_parent,
        "parent_given_child": given_child,
        "phi": phi,
        "parent_rate": [held_parent.mean()] if len(parent) else [],
        "child_rate": [held_child[child >= 0].mean()] if (child >= 0).any() else [],
    }
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _phi(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of two booleans [n]; None where one of them never changes."""
    n, n_a, n_b = float(len(a)), float(a.sum()), float(b.sum())
    spread = n_a * (n - n_a) * n_b * (n - n_b)
    return (n * float((a & b).sum()) - n_a * n_b) / spread**0.5 if spread else None


def changes(values: Mapping[str, float], families: Sequence[str], quantities: Sequence[str]) -> dict[str, float]:
    """`{quantity}_{family}_change`: masked minus clean, where both are there."""
    names = [f"{quantity}_{family}" for quantity in quantities for family in families]
    return {
        f"{name}_change": values[f"{name}_masked"] - values[f"{name}_clean"]
        for name in names
        if f"{name}_masked" in values and f"{name}_clean" in values
    }
