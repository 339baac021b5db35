"""stability: do other seeds find the same directions?"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evaluate.columns import Column
from evaluate.subject import Subject

NEEDS = ()
WANTS = ()
MOST_MATCHED = 4096  # latents; the matching takes their number to the third power
BLOCK_ROWS = 1024
COLUMNS = {
    "stability": Column(
        meaning="mean |cosine| of decoder rows with those of other seeds of the recipe, matched one to one",
        better="higher",
        paired=False,
        short="stability",
    ),
    "stability_max_cosine": Column(
        meaning="the same, with the most similar row in place of a matched one, mean of both directions",
        better="higher",
        paired=False,
    ),
}


def stability(subject: Subject) -> dict[str, float]:
    """Agreement of the decoder with those of other seeds (`subject.peers`), mean over peers; nothing without peers.

    stability is the PW-MCC of arXiv 2505.20254: for unit rows d_i and e_j the mean of |d_i . e_p(i)| under the
    one-to-one matching p that maximises it (Hungarian), over all latents of the smaller of the two, dead ones too: they
    stay near where they started, which another seed does not, so they count against it. Above 4,096 latents it is left
    out for its time. stability_max_cosine is (mean_i max_j |d_i . e_j| + mean_j max_i |d_i . e_j|) / 2, where several
    latents may find the same one. Values of different seeds share their peers, so they are not independent.
    """
    if not subject.peers:
        return {}
    own = _unit(subject.dictionary.directions)
    peers = [_unit(peer) for peer in subject.peers]
    values = {"stability_max_cosine": float(np.mean([_best_matches(own, peer) for peer in peers]))}
    if max(map(len, [own, *peers])) <= MOST_MATCHED:
        values["stability"] = float(np.mean([_matched(own, peer) for peer in peers]))
    return values


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _matched(rows: Tensor, others: Tensor) -> float:
    """Mean |cosine| of the best one-to-one matching of unit rows [n, d_model] and [m, d_model]."""
    cosine = (rows @ others.T).abs().double().cpu().numpy()
    return float(cosine[linear_sum_assignment(cosine, maximize=True)].mean())


def _best_matches(rows: Tensor, others: Tensor) -> float:
    """Mean over both sets of the largest |cosine| with a row of the other, in blocks of rows."""
    best_row, best_other = [], torch.zeros(len(others), device=others.device)
    for part in rows.split(BLOCK_ROWS):
        cosine = (part @ others.T).abs()
        best_row.append(cosine.amax(1))
        best_other = torch.maximum(best_other, cosine.amax(0))
    return float((torch.cat(best_row).double().mean() + best_other.double().mean()) / 2)
