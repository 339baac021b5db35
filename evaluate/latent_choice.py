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
    actual = labels.cpu().numpy()
    probes = [fit_sparse(latents, labels, order[:, :k]) for k in range(1, order.shape[1] + 1)]
    f1 = np.stack([f1_score((probe.logits(latents) > 0).cpu().numpy(), actual) for probe in probes])
    gains = np.diff(f1, axis=0) > F1_GAIN  # [MAX_MAIN - 1, classes]
    n_main = 1 + np.cumprod(gains, axis=0).sum(0)
    numbers = order.cpu().numpy()
    return [numbers[i, : n_main[i]] for i in range(len(labels))], f1[n_main - 1, np.arange(len(labels))]


def by_difference(latents: Tensor, labels: Tensor, most: int) -> Tensor:
    """Latent numbers [classes, most] in falling order of the size of the standardised mean difference."""
    return mean_difference(latents, labels).abs().topk(min(most, latents.shape[1]), dim=1).indices


def to_labels(labels: np.ndarray, like: Tensor) -> Tensor:
    """Boolean labels on the device of `like`."""
    return torch.from_numpy(labels).to(like.device)
