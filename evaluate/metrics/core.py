"""core: how well the activations are reconstructed, with how many latents, and what that does to the model."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluate.columns import Column
from evaluate.rows import Rows
from evaluate.splicing import Splice
from evaluate.subject import Dictionary, Subject, chunks

NEEDS_LANGUAGE = False
COLUMNS = {
    "l0": Column(meaning="latents on per clean token, at the matched threshold", short="L0", terminal=True),
    "l0_raw": Column(meaning="latents on per clean token, at the threshold training left", short="raw L0"),
    "l0_masked": Column(meaning="latents on per token of masked text, matched threshold"),
    "mse": Column(meaning="mean over tokens of |x - reconstruction|^2", better="lower"),
    "explained_variance": Column(
        meaning="1 - sum |x - reconstruction|^2 / sum |x - mean|^2 over clean held-out tokens",
        better="higher",
        short="EV",
        terminal=True,
    ),
    "explained_variance_raw": Column(meaning="the same at the threshold training left"),
    "explained_variance_legacy": Column(
        meaning="mean over tokens of 1 - error / variance, as published EVs", better="higher"
    ),
    "explained_variance_masked": Column(meaning="explained variance on tokens of masked text", better="higher"),
    "explained_variance_unreplaced": Column(
        meaning="the same, without the replaced tokens themselves", better="higher"
    ),
    "cossim": Column(meaning="mean cosine of x and its reconstruction", better="higher"),
    "l2_ratio": Column(meaning="mean of |reconstruction| / |x|; below 1 is shrinkage"),
    "dead_latents": Column(meaning="latents that never fire on the clean held-out tokens", short="dead"),
    "frac_alive": Column(meaning="share of latents that fire at least once there"),
    "ce_loss_without_sae": Column(meaning="the model's own loss, nats per token"),
    "ce_loss_with_ablation": Column(meaning="its loss with zeros in place of the activation"),
    "ce_loss_with_sae": Column(meaning="its loss with the reconstruction in place", better="lower"),
    "delta_ce": Column(
        meaning="loss added by the reconstruction, nats per token",
        better="lower",
        short="ΔCE",
        terminal=True,
    ),
    "ce_loss_score": Column(
        meaning="share of the zero-ablation damage that the reconstruction avoids", better="higher", short="CE score"
    ),
    "kl_div_with_sae": Column(meaning="KL from the model's own predictions, nats per token", better="lower"),
    "kl_div_with_ablation": Column(meaning="the same for zeros in place"),
    "kl_div_score": Column(meaning="1 - KL with the reconstruction / KL with zeros", better="higher"),
}


def core(subject: Subject) -> dict[str, float]:
    """Reconstruction on clean held-out rows at the matched threshold, on masked rows, and spliced into the model.

    explained_variance is pooled, 1 - sum_i |x_i - y_i|^2 / sum_i |x_i - mean|^2 (SAELens evals.py);
    explained_variance_legacy is the mean over tokens of 1 - |x_i - y_i|^2 / |x_i - mean|^2, which SAEBench published.
    ce_loss_score = (CE_zeros - CE_sae) / (CE_zeros - CE_clean); kl_div_score = 1 - KL_sae / KL_zeros (SAEBench core).
    """
    clean = _totals(subject.dictionary, subject.held_out)
    raw = clean if subject.raw is subject.dictionary else _totals(subject.raw, subject.held_out)
    alive = int((clean.n_firing > 0).sum())
    values = {
        "l0": clean.l0,
        "l0_raw": raw.l0,
        "mse": float(clean.error.mean()),
        "explained_variance": clean.explained_variance,
        "explained_variance_raw": raw.explained_variance,
        "explained_variance_legacy": float((1 - clean.error / clean.spread.clamp(min=1e-12)).mean()),
        "cossim": clean.cosine,
        "l2_ratio": clean.norm_ratio,
        "dead_latents": float(len(clean.n_firing) - alive),
        "frac_alive": alive / len(clean.n_firing),
    }
    if subject.bench.masked is not None and subject.held_out is subject.bench.clean:
        masked = _totals(subject.dictionary, subject.bench.masked)
        values |= {"l0_masked": masked.l0, "explained_variance_masked": masked.explained_variance}
        kept = torch.from_numpy(~np.asarray(subject.bench.replaced)).to(masked.error.device)
        rest = Rows(x=subject.bench.masked.x[kept])
        values["explained_variance_unreplaced"] = _totals(subject.dictionary, rest).explained_variance
    if subject.bench.splice is not None:
        values |= _spliced(subject, subject.bench.splice)
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class _Totals:
    """Per row: squared error and squared distance to the mean, [n]. Per latent: rows it fires on, [d_sae]."""

    error: Tensor
    spread: Tensor
    n_firing: Tensor
    l0: float
    cosine: float
    norm_ratio: float

    @property
    def explained_variance(self) -> float:
        return 1 - float(self.error.sum() / self.spread.sum())


def _totals(dictionary: Dictionary, rows: Rows) -> _Totals:
    mean = rows.x.mean(0)
    error, spread, cosine, ratio = [], [], [], []
    n_firing = torch.zeros(len(dictionary.directions), dtype=torch.long, device=rows.x.device)
    for part in chunks(rows):
        latents = dictionary.encode(part)
        reconstruction = dictionary.decode(latents)
        n_firing += (latents != 0).sum(0)
        error.append((part.x - reconstruction).square().sum(1).double())
        spread.append((part.x - mean).square().sum(1).double())
        cosine.append(torch.nn.functional.cosine_similarity(part.x, reconstruction, dim=1).double())
        ratio.append((reconstruction.norm(dim=1) / part.x.norm(dim=1).clamp(min=1e-12)).double())
    return _Totals(
        error=torch.cat(error),
        spread=torch.cat(spread),
        n_firing=n_firing,
        l0=float(n_firing.sum()) / rows.n,
        cosine=float(torch.cat(cosine).mean()),
        norm_ratio=float(torch.cat(ratio).mean()),
    )


def _spliced(subject: Subject, splice: Splice) -> dict[str, float]:
    reconstruction = torch.cat(
        [subject.dictionary.decode(subject.dictionary.encode(part)) for part in chunks(splice.rows)]
    )
    loss, divergence = splice.loss(reconstruction)
    ablated_loss, ablated_divergence = splice.ablated
    return {
        "ce_loss_without_sae": splice.clean_loss,
        "ce_loss_with_ablation": ablated_loss,
        "ce_loss_with_sae": loss,
        "delta_ce": loss - splice.clean_loss,
        "ce_loss_score": (ablated_loss - loss) / (ablated_loss - splice.clean_loss),
        "kl_div_with_sae": divergence,
        "kl_div_with_ablation": ablated_divergence,
        "kl_div_score": 1 - divergence / ablated_divergence,
    }
