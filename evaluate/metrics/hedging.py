"""hedging: how much of a correlated feature a latent writes along with its own."""

import numpy as np
import torch

from evaluate.best_latent import best_latents
from evaluate.columns import Column
from evaluate.leakage import MIN_F1
from evaluate.subject import Subject

NEEDS = ("language",)
WANTS = ()
COLUMNS = {
    "hedging": Column(
        meaning="how much of correlated features the decoder rows of latents hold, as a share of how much they hold of "
        "their own feature; the size, whatever its sign. An untrained SAE, where it has latents for half of the pairs, "
        "holds as much by chance",
        better="lower",
        oracle_is_best=True,
        random_is_worst=False,
        reliable=False,
    ),
    "hedging_signed": Column(meaning="the same with its sign: below 0, a latent takes the other feature away"),
    "n_hedging_pairs": Column(meaning="correlated pairs whose first feature has a latent (F1 at least 0.3)"),
}


def hedging(subject: Subject) -> dict[str, float]:
    """Hedging (arXiv 2505.11756, there by extending an SAE) against ground truth, on an even sample of fit text.

    Pairs (i, j) of features are chosen from the data: correlation 0.2 or more, and neither always on with the other, as
    a child is with its parent. Values of one attribute exclude each other, so they are never a pair. With latent(i) the
    latent of the best F1 for i, if that is 0.3 or more: least squares of its decoder row, times the value it usually
    has on i, on the effects of i, of j and of whatever else i implies (`Truth.written`); the mean size of the factor of
    j over the mean factor of i. 0 for the oracle, however the features are correlated. No number without a latent for
    half of the pairs.
    """
    language = subject.bench.language
    assert language is not None
    truth, even = language.truth, language.even
    assert even.features is not None
    numbers = np.unique(truth.pairs[:, 0])
    latents = subject.latents(even)
    best = best_latents(latents, torch.from_numpy(even.features[:, numbers]).to(latents.device))
    place = {int(number): i for i, number in enumerate(numbers)}
    factors = [
        truth.written(
            subject.dictionary.directions[best.number[place[int(i)]]] * best.usual[place[int(i)]], int(i), int(j)
        )
        for i, j in truth.pairs
        if best.f1[place[int(i)]] >= MIN_F1
    ]
    values = {"n_hedging_pairs": float(len(factors))}
    if factors and 2 * len(factors) >= len(truth.pairs):
        own = float(np.mean([factor.own for factor in factors]))
        values["hedging"] = float(np.mean([abs(factor.other) for factor in factors])) / own
        values["hedging_signed"] = float(np.mean([factor.other for factor in factors])) / own
    return values
