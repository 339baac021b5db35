"""core: how well the activations are reconstructed, with how many latents, and what that does to the model."""

import numpy as np
import torch

from evaluate.columns import Column
from evaluate.names import Measurements
from evaluate.reconstruction import Totals, totals
from evaluate.rows import Rows
from evaluate.splicing import Splice
from evaluate.subject import Subject, chunks

DENSITY_EDGES = np.arange(-5.0, 0.01, 0.25)  # of the bins of log10 firing rate, the share of tokens a latent fires on
DENSE = 0.1  # a latent that fires on a larger share of tokens is dense

NEEDS = ()
WANTS = ("shifted", "splice", "splice_shifted")
COLUMNS = {
    "l0": Column(meaning="latents on per clean token, at the matched threshold", short="L0", terminal=True),
    "l0_raw": Column(meaning="latents on per clean token, at the threshold training left", short="raw L0"),
    "l0_masked": Column(meaning="latents on per token of masked text, matched threshold"),
    "l0_shifted": Column(meaning="latents on per token of shifted text, matched threshold"),
    "mse": Column(meaning="mean over tokens of |x - reconstruction|^2", better="lower"),
    "mse_masked": Column(meaning="the same on masked text", better="lower"),
    "mse_shifted": Column(meaning="the same on shifted text", better="lower"),
    "explained_variance": Column(
        meaning="1 - sum |x - reconstruction|^2 / sum |x - mean|^2 over clean held-out tokens",
        better="higher",
        claim=True,
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
    "explained_variance_shifted": Column(meaning="explained variance on shifted text", better="higher"),
    "cossim": Column(meaning="mean cosine of x and its reconstruction", better="higher"),
    "cossim_masked": Column(meaning="the same on masked text", better="higher"),
    "cossim_shifted": Column(meaning="the same on shifted text", better="higher"),
    "l2_ratio": Column(meaning="mean of |reconstruction| / |x|; below 1 is shrinkage"),
    "dead_latents": Column(meaning="latents that never fire on the clean held-out tokens", short="dead"),
    "dense_latents": Column(meaning="latents that fire on more than a tenth of them"),
    "frac_alive": Column(meaning="share of latents that fire at least once there"),
    "density_histogram": Column(
        meaning="latents in each bin of log10 of the share of clean tokens they fire on, from -5 to 0 by 0.25"
    ),
    "ce_loss_without_sae": Column(meaning="the model's own loss, nats per token"),
    "ce_loss_with_ablation": Column(meaning="its loss with zeros in place of the activation"),
    "ce_loss_with_sae": Column(meaning="its loss with the reconstruction in place", better="lower"),
    "delta_ce": Column(
        meaning="loss added by the reconstruction, nats per token", better="lower", short="ΔCE", terminal=True
    ),
    "delta_ce_shifted": Column(meaning="the same on shifted text", better="lower"),
    "ce_loss_score": Column(
        meaning="share of the zero-ablation damage that the reconstruction avoids", better="higher", short="CE score"
    ),
    "ce_loss_score_shifted": Column(meaning="the same on shifted text", better="higher"),
    "kl_div_with_sae": Column(meaning="KL from the model's own predictions, nats per token", better="lower"),
    "kl_div_with_ablation": Column(meaning="the same for zeros in place"),
    "kl_div_score": Column(meaning="1 - KL with the reconstruction / KL with zeros", better="higher"),
}


def core(subject: Subject) -> Measurements:
    """Reconstruction of clean, masked and shifted rows at the matched threshold, and spliced into the model.

    explained_variance is pooled, 1 - sum_i |x_i - y_i|^2 / sum_i |x_i - mean|^2 (SAELens evals.py);
    explained_variance_legacy is the mean over tokens of 1 - |x_i - y_i|^2 / |x_i - mean|^2, which SAEBench published.
    ce_loss_score = (CE_zeros - CE_sae) / (CE_zeros - CE_clean); kl_div_score = 1 - KL_sae / KL_zeros (SAEBench core).
    A dead latent is in no bin of the histogram, and one that fires on fewer than 1 in 100,000 tokens in the first.
    """
    bench = subject.bench
    clean = totals(subject.dictionary, subject.held_out)
    raw = clean if subject.raw is subject.dictionary else totals(subject.raw, subject.held_out)
    values: Measurements = {
        **_reconstruction(clean, ""),
        "l0_raw": raw.l0,
        "explained_variance_raw": raw.explained_variance,
        "explained_variance_legacy": float((1 - clean.error / clean.spread.clamp(min=1e-12)).mean()),
        "l2_ratio": clean.norm_ratio,
        **_latents(clean),
    }
    if bench.masked is not None and _can_read(subject, bench.masked):
        masked = totals(subject.dictionary, bench.masked)
        values |= _reconstruction(masked, "_masked")
        kept = torch.from_numpy(~np.asarray(bench.replaced)).to(masked.error.device)
        if bool(kept.any()):
            values["explained_variance_unreplaced"] = masked.explained_variance_of(bench.masked.x, kept)
    if bench.shifted is not None and _can_read(subject, bench.shifted):
        values |= _reconstruction(totals(subject.dictionary, bench.shifted), "_shifted")
    if bench.splice is not None and _can_read(subject, bench.splice.rows):
        values |= _spliced(subject, bench.splice)
    if bench.splice_shifted is not None and _can_read(subject, bench.splice_shifted.rows):
        shifted = _spliced(subject, bench.splice_shifted)
        values |= {f"{name}_shifted": shifted[name] for name in ("delta_ce", "ce_loss_score")}
    return values


def _can_read(subject: Subject, rows: Rows) -> bool:
    """An SAE reads any rows; the oracle, which is scored on the labelled text, only those with labels."""
    return subject.held_out is subject.bench.clean or rows.features is not None


def _reconstruction(found: Totals, where: str) -> dict[str, float]:
    return {
        f"l0{where}": found.l0,
        f"mse{where}": float(found.error.mean()),
        f"explained_variance{where}": found.explained_variance,
        f"cossim{where}": found.cosine,
    }


def _latents(found: Totals) -> Measurements:
    """How often latents fire."""
    rate = found.n_firing.double().cpu().numpy() / found.n
    alive = rate[rate > 0]
    counts, _ = np.histogram(np.log10(alive).clip(min=DENSITY_EDGES[0]), DENSITY_EDGES)
    return {
        "dead_latents": float(len(rate) - len(alive)),
        "dense_latents": float((rate > DENSE).sum()),
        "frac_alive": len(alive) / len(rate),
        "density_histogram": [float(count) for count in counts],
    }


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
