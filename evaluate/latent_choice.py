"""Which latents stand for a class: chosen on the fit rows, never on the test rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluate.probes import f1_score, fit_logistic, logits, mean_difference

MAX_MAIN = 5
F1_GAIN = 0.03  # SAEBench: a latent joins the main ones while it adds this much F1


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseProbe:
    """One probe per class on its own k latents.

    chosen: [classes, k]. weights: [classes, k + 1], on latents shifted and scaled by mean and std, [classes, 1, k].
    """

    chosen: Tensor
    weights: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, latents: Tensor) -> Tensor:
        """[n, d_sae] -> [classes, n]."""
        return logits((gather(latents, self.chosen) - self.mean) / self.std, self.weights)


def gather(latents: Tensor, chosen: Tensor) -> Tensor:
    """[n, d_sae] and latent numbers [classes, k] -> [classes, n, k]."""
    return latents[:, chosen.flatten()].unflatten(1, chosen.shape).transpose(0, 1)


def fit_sparse(latents: Tensor, labels: Tensor, chosen: Tensor) -> SparseProbe:
    """Fit a probe per class on its latents: [n, d_sae], bool [classes, n], latent numbers [classes, k]."""
    features = gather(latents, chosen)
    std, mean = torch.std_mean(features, dim=1, correction=0, keepdim=True)
    std = torch.where(std > 1e-8, std, torch.ones_like(std))
    weights = fit_logistic((features - mean) / std, labels)
    return SparseProbe(chosen=chosen, weights=weights, mean=mean, std=std)


def main_latents(latents: Tensor, labels: Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """The latents that stand for each class: [n, d_sae], bool [classes, n] -> per class 1 to 5 latent numbers, and F1.

    Ordered by standardised positive mean difference. The first is always in; the next joins while the F1 of a
    logistic probe on all of them, on these rows, rises by more than 0.03 (the "split" latents of SAEBench absorption).
    F1 [classes] is that of the probe on all of a class's latents: a low one says that they do not stand for it.
    """
    order = mean_difference(latents, labels).topk(min(MAX_MAIN, latents.shape[1]), dim=1).indices
    actual, growing = labels.cpu().numpy(), np.arange(len(labels))  # growing: classes whose last latent joined
    n_main, f1 = np.zeros(len(labels), dtype=int), np.full(len(labels), -np.inf)
    for k in range(1, order.shape[1] + 1):
        here = torch.from_numpy(growing).to(order.device)
        probe = fit_sparse(latents, labels[here], order[here, :k])
        found = f1_score((probe.logits(latents) > 0).cpu().numpy(), actual[growing])
        gains = found - f1[growing] > F1_GAIN
        growing, found = growing[gains], found[gains]
        n_main[growing], f1[growing] = k, found
        if not len(growing):
            break
    numbers = order.cpu().numpy()
    return [numbers[i, : n_main[i]] for i in range(len(labels))], f1


def mean_nonzero(latents: Tensor) -> Tensor:
    """The mean size of each latent where it is on, [n, d_sae] -> [d_sae]; 1 for one that never is."""
    n_on = (latents != 0).sum(0)
    return torch.where(n_on > 0, latents.abs().sum(0) / n_on.clamp(min=1), torch.ones_like(latents[0]))


def by_scaled_difference(latents: Tensor, scale: Tensor, labels: Tensor, most: int) -> Tensor:
    """Latent numbers [classes, most] in falling order of |mean over the class - mean over the rest| / scale.

    [n, d_sae], [d_sae], bool [classes, n]. The choice of sae-probes (arXiv 2502.16681), whose scale is `mean_nonzero`;
    all latents where there are fewer than `most`.
    """
    on = labels.to(latents.dtype)
    n_on = on.sum(1, keepdim=True)
    sums = on @ latents
    rest = (latents.sum(0) - sums) / (len(latents) - n_on).clamp(min=1)
    difference = ((sums / n_on.clamp(min=1) - rest) / scale).abs()
    return difference.topk(min(most, latents.shape[1]), dim=1).indices


def to_labels(labels: np.ndarray, like: Tensor) -> Tensor:
    """Boolean labels on the device of `like`."""
    return torch.from_numpy(labels).to(like.device)
