"""cooccurrence: how latents fire together, and, with ground truth, how masking changes what parents and children do."""

import numpy as np
import torch
from torch import Tensor

from evaluate.cofiring import Cofiring, count_cofiring, jaccard_histogram, jaccard_statistics, pmi_statistics
from evaluate.columns import Column
from evaluate.language import EVERYWHERE
from evaluate.masked_language import VARIANTS, MaskedLanguage, Pairs, by_variant, changes
from evaluate.metrics.absorption import FAMILIES
from evaluate.names import Measurements
from evaluate.probes import one_hot
from evaluate.rows import Rows
from evaluate.subject import Subject

NEEDS = ()
WANTS = ("masked", "masked_language")
_STATISTICS = {
    "jaccard_mean": "rows with both / rows with either, mean over pairs of living latents",
    "jaccard_mean_independent": "the same if latents fired independently, each as often as it does",
    "jaccard_excess": "mean Jaccard minus its value under independence",
    "jaccard_lift": "mean Jaccard / its value under independence; 1 is chance",
    "jaccard_p99": "Jaccard that 1 % of the pairs exceed",
    "jaccard_p999": "Jaccard that 0.1 % of the pairs exceed",
    "jaccard_max_mean": "largest Jaccard of a latent with another, mean over latents",
    "pmi_mean": "log of rows with both / rows expected by chance, nats, mean over pairs expected on 5 rows or more",
    "pmi_p99": "the same, 99th percentile",
    "living_latents": "latents on in 10 rows or more: at an equal L0, fewer of them overlap more by chance",
}
_SHORT = {"jaccard_mean": "Jaccard", "jaccard_lift": "Jaccard lift", "jaccard_max_mean": "max Jaccard"}
_ORDERED = ("jaccard_mean", "jaccard_excess", "jaccard_lift", "jaccard_p99", "jaccard_p999", "jaccard_max_mean")
_CAUTION = "; compare recipes of one architecture: an untrained topk SAE, with k latents on every token, has less"
_TEXTS = {"_masked": "tokens of masked text", "_unreplaced": "tokens of masked text that were not replaced"}
_DATA = {
    "child_given_parent": "P(a token's child is held | its parent is), mean over parents",
    "parent_given_child": "P(a token's parent is held | its child is), mean over parents",
    "phi": "correlation of parent held and child held over tokens, mean over pairs",
    "parent_rate": "share of tokens whose parent is held",
    "child_rate": "share of tokens with a child whose child is held",
}
_WHERE = {"clean": "clean text", "masked": "masked text", "kept": "masked text, own token kept"}
_CHANGING = ("child_given_parent", "parent_given_child", "phi")


def _columns() -> dict[str, Column]:
    columns = {
        name: Column(
            meaning=meaning + _CAUTION if name in _ORDERED else meaning,
            better="lower" if name in _ORDERED else "",
            random_is_worst=False,
            reliable=name not in _ORDERED,
            short=_SHORT.get(name, ""),
        )
        for name, meaning in _STATISTICS.items()
    }
    for suffix, where in _TEXTS.items():
        columns |= {f"{name}{suffix}": Column(meaning=f"{where}: {words}") for name, words in _STATISTICS.items()}
    for suffix, where in {"": "clean tokens", "_masked": _TEXTS["_masked"]}.items():
        columns[f"jaccard_histogram{suffix}"] = Column(meaning=f"{where}: share of pairs in each bin of their Jaccard")
    for prefix, what in {"data": "the data, whatever the SAE", "latent": "best latent of each, on = held"}.items():
        for quantity, words in _DATA.items():
            for family in FAMILIES:
                start = f"{family.replace('_', ' ')}, {what}"
                name = f"{prefix}_{quantity}_{family}"
                columns |= {
                    f"{name}_{variant}": Column(meaning=f"{start}, {_WHERE[variant]}: {words}") for variant in VARIANTS
                }
                if quantity in _CHANGING:
                    columns[f"{name}_change"] = Column(meaning=f"{start}, masked - clean: {words}")
    return columns


COLUMNS = _columns()


def cooccurrence(subject: Subject) -> Measurements:
    """Jaccard and PMI of pairs of latents, on clean held-out rows, masked rows, and masked rows with their own token.

    Latents on in fewer than 10 of the rows are left out; of more than 4,096 a sample is counted (evaluate/cofiring.py
    has the formulas). The oracle is counted on the even sample of the labelled text, where its labels are.

    Which number to read: Jaccard depends on how often latents fire. At an equal L0 fewer living latents fire
    more often each: on the embedded model 220 latents have twice the mean Jaccard of 512, and half as much again of
    excess over independence, but a smaller ratio to it. jaccard_lift, the ratio, is free of that to first order, so it
    is the one to read. It is not free of how L0 is spread over tokens: latents that fire on a few crowded tokens co-
    fire more. Lower is what masking is said to do, and on the embedded model oracle < trained < untrained where a
    threshold decides what fires. But it ranks no SAEs at large: an untrained topk SAE, whose L0 is the same on every
    token, has hardly more than chance, a parent's latent should fire with its child's, and one that absorption silences
    co-fires less.

    With the masked language, `data_...` is what the activations hold in clean and masked text, the same for every SAE
    (MaskedLanguage.coactivation), and `latent_...` is the same with "the parent's latent is on" for "the parent is
    held": of all latents the one with the best F1 on fit text, and for its child the best of the others.
    How to read it: a token that is itself masked loses both parent and child in the same-token family (and most of both
    in the two-token one), so its rates fall and P(child | parent) stays; parent without child, which would make
    absorption costly, arises only where other tokens carry them: compare "kept" with "clean", cross-token.
    """
    bench = subject.bench
    values: Measurements = {}
    counts = count_cofiring(subject.dictionary, _even(subject.held_out), subject.seed)
    values |= {**_statistics(counts), "jaccard_histogram": jaccard_histogram(counts)}
    if bench.masked is not None and bench.replaced is not None and subject.held_out is bench.clean:
        masked = count_cofiring(subject.dictionary, bench.masked, subject.seed)
        kept = torch.from_numpy(~bench.replaced).to(bench.masked.x.device)
        unreplaced = count_cofiring(subject.dictionary, Rows(x=bench.masked.x[kept]), subject.seed)
        for suffix, found in {"_masked": masked, "_unreplaced": unreplaced}.items():
            values |= {f"{name}{suffix}": value for name, value in _statistics(found).items()}
        values["jaccard_histogram_masked"] = jaccard_histogram(masked)
    if bench.masked_language is not None:
        data = bench.masked_language.coactivation
        found = {"data": {**data, **changes(data, FAMILIES, _CHANGING)}}
        if subject.held_out is bench.clean:
            latent = _latent_coactivation(subject, bench.masked_language)
            found["latent"] = {**latent, **changes(latent, FAMILIES, _CHANGING)}
        values |= {f"{prefix}_{name}": value for prefix, numbers in found.items() for name, value in numbers.items()}
    return values


def _even(rows: Rows) -> Rows:
    """Of labelled text, which has more of the positions that relations are read at, the even sample; else all rows."""
    if EVERYWHERE not in rows.positions or not rows.positions[EVERYWHERE].any():
        return rows
    chosen = rows.positions[EVERYWHERE]
    x = rows.x[torch.from_numpy(chosen).to(rows.x.device)]
    return Rows(x=x, features=None if rows.features is None else rows.features[chosen])


def _statistics(counts: Cofiring) -> dict[str, float]:
    return {**jaccard_statistics(counts), **pmi_statistics(counts), "living_latents": float(len(counts.firing))}


def _latent_coactivation(subject: Subject, masked: MaskedLanguage) -> dict[str, float]:
    """MaskedLanguage.coactivation with latents that are on for what is held."""
    values: dict[str, float] = {}
    texts = {"clean": subject.latents(masked.clean), "masked": subject.latents(masked.masked)}
    for pairs in masked.pairs:
        of_parent, of_child = _best_latents(subject.latents(masked.language.fit), masked, pairs)
        parent, child = of_parent[pairs.parents.number(pairs.parent)], of_child[pairs.children.number(pairs.child)]
        reads = {
            text: (_on(latents, pairs.rows, parent), _on(latents, pairs.rows, child)) for text, latents in texts.items()
        }
        values |= by_variant(pairs, reads, masked.replaced)
    return values


def _best_latents(latents: Tensor, masked: MaskedLanguage, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The latent with the best F1 on fit text for each parent, [n_parents], and the best other one for each child.

    latents: [n_fit, d_sae] of the fit text.
    """
    rows, relation = pairs.known.fit.rows, pairs.known.relation
    on = (latents[torch.from_numpy(rows).to(latents.device)] != 0).to(torch.float32)
    of_parent = _f1(on, pairs.known.fit.labels).argmax(0)
    f1 = _f1(on, one_hot(masked.language.fit.attributes[relation.child][rows], pairs.children.classes))
    owner = torch.from_numpy(pairs.parents.number(pairs.owner)).to(on.device)
    f1 = f1.scatter(0, of_parent[owner].unsqueeze(0), -1.0)
    return of_parent.cpu().numpy(), f1.argmax(0).cpu().numpy()


def _f1(on: Tensor, labels: np.ndarray) -> Tensor:
    """F1 of "latent is on" as a predictor of each class: [n, d_sae], bool [n_classes, n] -> [d_sae, n_classes]."""
    actual = torch.from_numpy(labels.T).to(on)
    return 2 * (on.T @ actual) / (on.sum(0).unsqueeze(1) + actual.sum(0)).clamp(min=1)


def _on(latents: Tensor, rows: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Whether latent `number` [n] is on in each of the rows [n]."""
    chosen = latents[torch.from_numpy(rows).to(latents.device), torch.from_numpy(number).to(latents.device)]
    return (chosen != 0).cpu().numpy()
