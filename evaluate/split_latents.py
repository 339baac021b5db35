"""The latents that stand for a letter, chosen on train words by k-sparse probing as in Chanin et al. (2409.14507)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluate.latent_choice import F1_GAIN, SparseProbe, fit_sparse, gather, to_labels
from evaluate.probes import f1_score, one_hot
from evaluate.spelling import SpelledWords, Spelling
from evaluate.subject import Dictionary, chunks

N_CANDIDATES = 50  # latents of a letter that the L1 probe may choose from
MAX_SPLIT = 10
L1 = 0.01
MAX_STEPS = 500
CONVERGED = 1e-4  # the largest change of a weight in the last step; weights are about 1
CHUNK = 512  # words whose latents exist at a time: with 65,536 of them, 134 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitLatents:
    """For each usable letter: its latents, in order; F1 on train words of a probe on all of them; F1 on test words of
    a probe on the first alone (fitted on train words)."""

    latents: list[np.ndarray]
    train_f1: np.ndarray
    k1_f1: np.ndarray


def split_latents(dictionary: Dictionary, spelling: Spelling) -> SplitLatents:
    """The latents that stand for each letter.

    Upstream ranks all latents by the weights of a one-vs-rest probe with an L1 penalty of 0.01; here that probe sees
    the 50 latents with the largest standardised positive mean difference (`_candidates`). In the order of its weights
    a latent joins while the F1 of a logistic probe on all so far rises by more than 0.03, ten at most. The first is
    always in, the others need a positive weight. F1 is taken on train words, never on those
    that are scored; what upstream does here was not checked.
    """
    labels = to_labels(one_hot(spelling.train.letters, spelling.letters), spelling.train.rows.x)
    candidates = _candidates(dictionary, spelling.train, labels)
    union, place = candidates.unique(return_inverse=True)  # place: [letters, n_candidates], columns of what is kept
    train, test = (_latents_of(dictionary, words, union) for words in (spelling.train, spelling.test))

    weights = l1_weights(gather(train, place), labels)
    order = weights.argsort(dim=1, descending=True, stable=True)[:, :MAX_SPLIT]
    chosen = place.gather(1, order)
    most = (weights.gather(1, order) > 0).sum(1).clamp(min=1).cpu().numpy()
    first = fit_sparse(train, labels, chosen[:, :1])
    n_split, train_f1 = np.ones(len(labels), np.int64), _f1(first, train, spelling.train.letters, spelling)
    for k in range(2, chosen.shape[1] + 1):
        f1 = _f1(fit_sparse(train, labels, chosen[:, :k]), train, spelling.train.letters, spelling)
        joins = (n_split == k - 1) & (most >= k) & (f1 - train_f1 > F1_GAIN)
        if not joins.any():
            break
        n_split[joins], train_f1[joins] = k, f1[joins]
    numbers = union[chosen].cpu().numpy()
    return SplitLatents(
        latents=[row[:n] for row, n in zip(numbers, n_split, strict=True)],
        train_f1=train_f1,
        k1_f1=_f1(first, test, spelling.test.letters, spelling),
    )


def _f1(probe: SparseProbe, latents: Tensor, letters: np.ndarray, spelling: Spelling) -> np.ndarray:
    """F1 of the probe of each usable letter on words with these latents and letters: [n_letters]."""
    return f1_score((probe.logits(latents) > 0).cpu().numpy(), one_hot(letters, spelling.letters))


def _candidates(dictionary: Dictionary, words: SpelledWords, labels: Tensor) -> Tensor:
    """The latents [letters, n_candidates] with the largest (mean over the letter - mean over the rest) / deviation.

    As `probes.mean_difference`, from sums over a few words at a time. A latent that never changes comes last.
    """
    d_sae, start = len(dictionary.directions), 0
    sums = torch.zeros(len(labels), d_sae, dtype=torch.float64, device=labels.device)
    total, squares = torch.zeros_like(sums[0]), torch.zeros_like(sums[0])
    for rows in chunks(words.rows, CHUNK):
        latents = dictionary.encode(rows)
        sums += labels[:, start : start + rows.n].to(latents.dtype) @ latents
        total += latents.sum(0)
        squares += latents.square().sum(0)
        start += rows.n
    n, n_on = words.rows.n, labels.sum(1, keepdim=True)
    difference = sums / n_on.clamp(min=1) - (total - sums) / (n - n_on).clamp(min=1)
    deviation = (squares / n - (total / n).square()).clamp(min=0).sqrt()
    score = torch.where(deviation > 1e-6, difference / deviation.clamp(min=1e-6), torch.zeros_like(difference))
    return score.topk(min(N_CANDIDATES, score.shape[1]), dim=1).indices


def _latents_of(dictionary: Dictionary, words: SpelledWords, numbers: Tensor) -> Tensor:
    """Some latents [n, n_numbers] of all words."""
    return torch.cat([dictionary.encode(rows)[:, numbers] for rows in chunks(words.rows, CHUNK)])


def l1_weights(latents: Tensor, labels: Tensor) -> Tensor:
    """Weights of class-balanced logistic probes with an L1 penalty: [classes, n, k], bool [classes, n] -> [classes, k].

    Minimises mean_i s_i log(1 + exp(-y_i z_i)) + 0.01 |w|_1 with s_i = n / (2 n_class(i)), the intercept free, by
    accelerated proximal gradient (FISTA). A latent is measured in units of its mean where it is on, so the penalty
    means the same for every dictionary: one that fires on less than about 4 % of a letter's words gets nothing.
    """
    on = latents != 0
    size = latents.abs().sum(1, keepdim=True) / on.sum(1, keepdim=True).clamp(min=1)  # [classes, 1, k]
    x = torch.cat([latents / size.clamp(min=1e-12), torch.ones_like(latents[..., :1])], dim=2)
    n, n_on = x.shape[1], labels.sum(1, keepdim=True)
    sample = torch.where(labels, 0.5 / n_on.clamp(min=1), 0.5 / (n - n_on).clamp(min=1)).to(x.dtype)  # s_i / n
    hessian = x.transpose(1, 2) @ (sample.unsqueeze(2) * x)
    step = (4 / torch.linalg.eigvalsh(hessian.double())[:, -1:]).to(x.dtype)
    threshold = L1 * step * (torch.arange(x.shape[2], device=x.device) < x.shape[2] - 1)  # not on the intercept
    weights = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
    ahead, momentum = weights, torch.ones_like(step)
    for _ in range(MAX_STEPS):
        pull = sample * (torch.sigmoid((x @ ahead.unsqueeze(2)).squeeze(2)) - labels.to(x.dtype))
        moved = ahead - step * (pull.unsqueeze(1) @ x).squeeze(1)
        new = moved.sign() * (moved.abs() - threshold).clamp(min=0)
        change = new - weights
        uphill = ((ahead - new) * change).sum(1, keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)  # a probe that overshot starts anew
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = new + (momentum - 1) / following * change
        weights, momentum = new, following
        if float(change.abs().max()) < CONVERGED:
            break
    return weights[:, :-1]
