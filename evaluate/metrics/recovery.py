"""recovery: how many ground-truth features have a latent of their own."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from evaluate.best_latent import best_latents
from evaluate.columns import Column
from evaluate.language import EVERYWHERE
from evaluate.subject import Subject

NEEDS = ("language",)
WANTS = ()
COLUMNS = {
    "mcc": Column(
        meaning="mean |correlation| of ground-truth features and latents, matched one to one",
        better="higher",
        oracle_is_best=True,
        short="MCC",
        terminal=True,
    ),
    "mmcs": Column(
        meaning="mean cosine of the directions of ground-truth features and the decoder rows of latents that fire, "
        "matched one to one",
        better="higher",
        oracle_is_best=True,
    ),
    "uniqueness": Column(
        meaning="different ground-truth features that are some latent's best match, as a share of all features",
        better="higher",
        oracle_is_best=True,
    ),
    "f1": Column(
        meaning="mean over ground-truth features of the F1 of the best single latent; @ parts: by kind of feature",
        better="higher",
        oracle_is_best=True,
    ),
    "precision": Column(
        meaning="mean over ground-truth features of the precision of the latent with the best F1",
        better="higher",
        oracle_is_best=True,
    ),
    "recall": Column(
        meaning="mean over ground-truth features of the recall of the latent with the best F1",
        better="higher",
        oracle_is_best=True,
    ),
}


def recovery(subject: Subject) -> dict[str, float]:
    """Agreement with the binary ground-truth features, on an even sample of test tokens.

    mcc: mean |Pearson| of latents and features under the Hungarian one-to-one matching that maximises it. mmcs: mean
    cosine of the features' directions (the oracle's) and the decoder rows of living latents under the matching that
    maximises that; in d_model dimensions random rows have some. Both are over all features: one without a latent counts
    0, so dead latents cost and dictionaries of different size compare. (sae_lens.synthetic calls mmcs "mcc": it takes
    |cos|, matches dead latents too and divides by the pairs.)
    uniqueness: distinct best-matching features of the living latents / n_features; sae_lens.synthetic divides by the
    latents. precision, recall, f1: "latent is on" as a predictor of "feature is on", for the latent with the best F1 of
    each feature; sae_lens.synthetic goes the other way, from each latent to its feature. f1@letter and so on are means
    over the features of a kind, named by the first word of the feature's name.
    Features that never occur, or always, do not count.
    """
    language = subject.bench.language
    assert language is not None
    assert language.test.features is not None
    rows = np.flatnonzero(language.test.positions[EVERYWHERE])
    latents = subject.latents(language.test)[torch.from_numpy(rows).to(language.test.x.device)]
    n_on = language.test.features[rows].sum(0)
    varied = np.flatnonzero((n_on > 0) & (n_on < len(rows)))
    features = torch.from_numpy(language.test.features[rows][:, varied]).to(latents)

    correlation = _correlation(latents, features).abs().cpu().numpy()
    alive = (latents != 0).any(0).cpu().numpy()
    effects = language.truth.effects[torch.from_numpy(varied).to(latents.device)]
    living = subject.dictionary.directions[torch.from_numpy(alive).to(latents.device)].double()
    cosine = (normalize(living, dim=1) @ normalize(effects, dim=1).T).cpu().numpy()
    best = best_latents(latents, features)
    return {
        "mcc": _matched(correlation) / len(varied),
        "mmcs": _matched(cosine) / len(varied),
        "uniqueness": len(np.unique(correlation[alive].argmax(1))) / len(varied),
        "f1": float(best.f1.mean()),
        "precision": float(best.precision.mean()),
        "recall": float(best.recall.mean()),
        **_by_kind(best.f1.cpu().numpy(), [language.feature_names[int(i)] for i in varied]),
    }


def _matched(similarity: np.ndarray) -> float:
    """The largest sum of [d_sae, n_features] over pairs of one latent and one feature."""
    return float(similarity[linear_sum_assignment(similarity, maximize=True)].sum())


def _by_kind(f1: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    kinds = np.array([name.split()[0] for name in names])
    return {f"f1@{kind}": float(f1[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}


def _correlation(latents: Tensor, features: Tensor) -> Tensor:
    """Pearson correlation [d_sae, n_features]; 0 for a column that never changes."""
    means = [columns.mean(0) for columns in (latents, features)]
    spreads = [
        (columns.square().mean(0) - mean.square()).clamp(min=0).sqrt().clamp(min=1e-12)
        for columns, mean in zip((latents, features), means, strict=True)
    ]
    covariance = latents.T @ features / len(latents) - torch.outer(*means)
    return covariance / torch.outer(*spreads)
