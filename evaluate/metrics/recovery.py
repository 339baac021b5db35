"""recovery: how many ground-truth features have a latent of their own."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evaluate.columns import Column
from evaluate.language import EVERYWHERE
from evaluate.subject import Subject

NEEDS_LANGUAGE = True
COLUMNS = {
    "mcc": Column(
        meaning="mean |correlation| of ground-truth features and latents, matched one to one",
        better="higher",
        oracle_is_best=True,
        short="MCC",
        terminal=True,
    ),
    "uniqueness": Column(
        meaning="different ground-truth features that are some latent's best match, as a share of all features",
        better="higher",
        oracle_is_best=True,
    ),
    "f1": Column(
        meaning="mean over ground-truth features of the F1 of the best single latent",
        better="higher",
        oracle_is_best=True,
    ),
}


def recovery(subject: Subject) -> dict[str, float]:
    """MCC, uniqueness and F1 against the binary ground-truth features, on an even sample of test tokens.

    mcc: mean |Pearson| of latents and features under the Hungarian one-to-one matching that maximises it, over
    all features: one without a latent counts 0, so dead latents cost and dictionaries of different size compare.
    (sae_lens.synthetic takes |cos| of directions and divides by the pairs; labels are what we have.) uniqueness:
    distinct best-matching features of the living latents / n_features. f1: "latent is on" as a predictor of "feature is
    on". Features that never occur do not count.
    """
    language = subject.bench.language
    assert language is not None
    assert language.test.features is not None
    rows = np.flatnonzero(language.test.positions[EVERYWHERE])
    latents = subject.latents("test")[torch.from_numpy(rows).to(language.test.x.device)]
    features = torch.from_numpy(language.test.features[rows]).to(latents)
    varied = (features.sum(0) > 0) & (features.sum(0) < len(rows))
    features = features[:, varied]

    correlation = _correlation(latents, features).abs().cpu().numpy()
    n_features = correlation.shape[1]
    matched = linear_sum_assignment(correlation, maximize=True)
    alive = (latents != 0).any(0).cpu().numpy()
    return {
        "mcc": float(correlation[matched].sum() / n_features),
        "uniqueness": len(np.unique(correlation[alive].argmax(1))) / n_features,
        "f1": float(_best_f1(latents, features).mean()),
    }


def _correlation(latents: Tensor, features: Tensor) -> Tensor:
    """Pearson correlation [d_sae, n_features]; 0 for a column that never changes."""
    means = [columns.mean(0) for columns in (latents, features)]
    spreads = [
        (columns.square().mean(0) - mean.square()).clamp(min=0).sqrt().clamp(min=1e-12)
        for columns, mean in zip((latents, features), means, strict=True)
    ]
    covariance = latents.T @ features / len(latents) - torch.outer(*means)
    return covariance / torch.outer(*spreads)


def _best_f1(latents: Tensor, features: Tensor) -> Tensor:
    """Best F1 over latents for every feature, [n_features]."""
    on = (latents != 0).to(features.dtype)
    hits = on.T @ features
    return (2 * hits / (on.sum(0).unsqueeze(1) + features.sum(0)).clamp(min=1)).amax(0)
