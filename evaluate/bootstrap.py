"""The bootstrap of a mean AUC over test rows, so that two probes can be compared on the same resamples."""

import numpy as np
import torch
from torch import Tensor

N_RESAMPLES = 1000


def resampled_counts(labels: np.ndarray, generator: np.random.Generator, n_resamples: int = N_RESAMPLES) -> Tensor:
    """How often each row is drawn in each resample: bool [n_classes, n] -> float32 [n_resamples, n].

    Rows are drawn with replacement class by class (and among the rows of no class), so every resample has as many rows
    of each as there are.
    """
    counts = np.empty((n_resamples, labels.shape[1]), dtype=np.float32)
    for group in (*labels, ~labels.any(0)):
        if n := int(group.sum()):
            counts[:, group] = generator.multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return torch.from_numpy(counts)


def resampled_auc(scores: np.ndarray, labels: np.ndarray, counts: Tensor) -> np.ndarray:
    """AUC on every resample, mean over probe seeds and classes: [n_seeds, n_classes, n], bool [n_classes, n] -> [R].

    To first order in the counts: AUC + sum_i (count_i - 1) share_i / n_class(i), where share_i is the share of the
    other class that row i is on the right side of (DeLong et al. 1988). The product of the two classes' deviations is
    left out: it is smaller by the root of a class's rows, and without it a thousand resamples of every probe are one
    product of matrices.
    """
    weights = np.zeros(labels.shape[1])
    mean = 0.0
    for values, on in zip(scores.transpose(1, 0, 2), labels, strict=True):
        share = right_side(values, on).mean(0)
        mean += share[on].mean() / len(labels)
        weights[on] += share[on] / (on.sum() * len(labels))
        weights[~on] += share[~on] / ((~on).sum() * len(labels))
    return mean + ((counts - 1).double() @ torch.from_numpy(weights)).numpy()


def right_side(scores: np.ndarray, on: np.ndarray) -> np.ndarray:
    """The share of the other class that each row is on the right side of: [batch, n], bool [n] -> [batch, n].

    Ties count half. Its mean over either class is the AUC.
    """
    values = torch.from_numpy(np.ascontiguousarray(scores))
    positive = torch.from_numpy(on)
    high, low = values[:, positive].contiguous(), values[:, ~positive].contiguous()
    share = torch.empty_like(values, dtype=torch.float64)
    share[:, positive] = _share_below(high, low)
    share[:, ~positive] = 1 - _share_below(low, high)
    return share.numpy()


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Share of `others` [batch, m] below each of `values` [batch, n], ties half: [batch, n]."""
    ordered = others.sort(dim=1).values
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return below.double() / (2 * others.shape[1])
