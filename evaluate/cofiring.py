"""Co-firing: on how many rows two latents are on together, for all pairs, and what follows from it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_spec.seeds import derive_seed
from evaluate.rows import Rows
from evaluate.subject import Dictionary, chunks

MIN_FIRING = 10  # rows; the overlap of rarer latents is chance
MAX_LATENTS = 4096  # counts of all their pairs are 128 MiB
MIN_EXPECTED = 5  # rows; below it PMI is noise
HISTOGRAM_EDGES = np.concatenate([[0.0], np.logspace(-4, 0, 33)])  # of Jaccard; the last bin holds 1 too


@dataclass(frozen=True, kw_only=True, eq=False)
class Cofiring:
    """Counts over `n_rows` rows of `m` latents.

    firing: [m] float64, rows each is on. together: [m, m] float64, rows both are on; the diagonal is `firing`.
    """

    n_rows: int
    firing: Tensor
    together: Tensor

    @property
    def pairs(self) -> Tensor:
        """[m, m] booleans, true above the diagonal: each pair once."""
        return torch.ones_like(self.together, dtype=torch.bool).triu(1)

    @property
    def jaccard(self) -> Tensor:
        """[m, m]: rows with both / rows with either."""
        return self.together / (self.firing.unsqueeze(1) + self.firing - self.together)


def count_cofiring(dictionary: Dictionary, rows: Rows, seed: int) -> Cofiring:
    """Count all pairs of living latents (on in at least MIN_FIRING of the rows); an even sample if they are too many.

    0/1 products of a chunk are summed in float32, exact below 2^24 rows, and the chunks in float64.
    """
    n_firing = torch.zeros(len(dictionary.directions), dtype=torch.long, device=rows.x.device)
    for part in chunks(rows):
        n_firing += (dictionary.encode(part) != 0).sum(0)
    living = (n_firing >= MIN_FIRING).nonzero().squeeze(1)
    if len(living) > MAX_LATENTS:
        generator = np.random.default_rng(derive_seed("evaluate/cofiring latents", seed))
        chosen = np.sort(generator.choice(len(living), MAX_LATENTS, replace=False))
        living = living[torch.from_numpy(chosen).to(living.device)]
    together = torch.zeros(len(living), len(living), dtype=torch.float64, device=rows.x.device)
    for part in chunks(rows):
        on = (dictionary.encode(part)[:, living] != 0).to(torch.float32)
        together += (on.T @ on).double()
    return Cofiring(n_rows=rows.n, firing=n_firing[living].double(), together=together)


def jaccard_statistics(counts: Cofiring) -> dict[str, float]:
    """Mean and tail of Jaccard over pairs, and its mean if all latents were independent; {} for fewer than two latents.

    jaccard_mean_independent: mean over pairs of p_i p_j / (p_i + p_j - p_i p_j), p the firing rates. jaccard_max_mean:
    mean over latents of the largest Jaccard with another.
    """
    if len(counts.firing) < 2:
        return {}
    jaccard = counts.jaccard
    values = jaccard[counts.pairs].cpu().numpy()
    rate = counts.firing / counts.n_rows
    product = torch.outer(rate, rate)
    independent = product / (rate.unsqueeze(1) + rate - product)
    mean, expected = float(values.mean()), float(independent[counts.pairs].mean())
    p99, p999 = np.quantile(values, [0.99, 0.999])
    return {
        "jaccard_mean": mean,
        "jaccard_mean_independent": expected,
        "jaccard_excess": mean - expected,
        "jaccard_lift": mean / expected,
        "jaccard_p99": float(p99),
        "jaccard_p999": float(p999),
        "jaccard_max_mean": float(jaccard.fill_diagonal_(0).amax(1).mean()),
    }


def pmi_statistics(counts: Cofiring) -> dict[str, float]:
    """Mean and 99th percentile of pointwise mutual information in nats, over pairs expected together on >= 5 rows.

    PMI = log(p_ij / (p_i p_j)) with half a row added to the count and to its expectation,
    log((n_ij + 1/2) / (n_i n_j / n + 1/2)): some such pairs never meet, and the logarithm of 0 would drown the rest.
    {} if there is no such pair.
    """
    expected = torch.outer(counts.firing, counts.firing) / counts.n_rows
    chosen = counts.pairs & (expected >= MIN_EXPECTED)
    if not bool(chosen.any()):
        return {}
    values = ((counts.together[chosen] + 0.5) / (expected[chosen] + 0.5)).log().cpu().numpy()
    return {"pmi_mean": float(values.mean()), "pmi_p99": float(np.quantile(values, 0.99))}


def jaccard_histogram(counts: Cofiring) -> list[float]:
    """Share of pairs in each bin of HISTOGRAM_EDGES."""
    values = counts.jaccard[counts.pairs].cpu().numpy()
    return (np.histogram(values, HISTOGRAM_EDGES)[0] / max(1, len(values))).tolist()
