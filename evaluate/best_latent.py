"""The latent that predicts a ground-truth feature best: latent(c) of the measures that know the truth."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class BestLatents:
    """For each feature the latent with the highest F1, "it is on" predicting "the feature is on": all [n_features].

    usual: the mean of its values on the feature's rows, where it is on at all.
    """

    number: Tensor
    f1: Tensor
    precision: Tensor
    recall: Tensor
    usual: Tensor


def best_latents(latents: Tensor, features: Tensor) -> BestLatents:
    """[n, d_sae] latents and [n, n_features] features, zero where off -> the best latent of each feature.

    F1 = 2 TP / (predicted + actual), as scikit-learn's; everything is 0 for a feature on which no latent fires. Of
    equal latents the first is taken.
    """
    on = (latents != 0).to(latents.dtype)
    actual = (features != 0).to(latents.dtype)
    hits = on.T @ actual  # [d_sae, n_features]
    n_on, n_actual = on.sum(0), actual.sum(0)
    best = (2 * hits / (n_on.unsqueeze(1) + n_actual).clamp(min=1)).max(0)
    hit = hits.gather(0, best.indices.unsqueeze(0)).squeeze(0)
    return BestLatents(
        number=best.indices,
        f1=best.values,
        precision=hit / n_on[best.indices].clamp(min=1),
        recall=hit / n_actual.clamp(min=1),
        usual=(latents.T @ actual).gather(0, best.indices.unsqueeze(0)).squeeze(0) / hit.clamp(min=1),
    )
