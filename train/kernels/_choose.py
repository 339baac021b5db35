"""Which codes are on: the rules of train/activations.py, applied to the few values that may be wanted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.activations import BatchTopK, JumpReLU, TopK
from train.kernels._entries import Entries, row_starts
from train.kernels._search import Candidates, Groups, batch_bound, row_bounds

MARGIN = 1 / 64
"""Of a bound, as a share: what bfloat16 may have put below it by rounding is a candidate too."""
Refine = Callable[[Tensor, Tensor], Tensor]
"""(row [n], latent [n]) -> pre-activations [n] in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The codes of a batch."""

    entries: Entries
    """Codes that are on; of a JumpReLU also those that are off and in its window, with the code 0."""
    smallest: Tensor | None
    """The smallest code that is on, infinite if none is; only for a running threshold."""
    pre: Tensor
    """[n]: the entries' pre-activations."""
    on: Tensor | None = None
    """[n] bool, where some are off."""


def choose_topk(activation: TopK, pre: Tensor, refine: Refine | None) -> Chosen:
    """The k largest of each row of pre-activations [batch, d_sae], as far as they are positive."""
    groups = Groups(pre, activation.k)
    found = _refined(groups.above(_positive(row_bounds(groups, activation.k), refine)), refine)
    starts = row_starts(found.row, len(pre))
    counts = torch.diff(starts, append=starts.new_tensor([len(found.row)]))
    width = int(counts.max()) if len(counts) else 0
    if width > activation.k:
        place = torch.arange(len(found.row), device=pre.device) - starts[found.row]
        padded = found.value.new_full((len(pre), width), -torch.inf)
        padded[found.row, place] = found.value
        best = padded.topk(activation.k, dim=1, sorted=False).indices
        kept = torch.zeros(len(found.row), dtype=torch.bool, device=pre.device)
        kept[(starts.unsqueeze(1) + best)[best < counts.unsqueeze(1)]] = True
        found = _only(found, kept)
    return _chosen(_on(found, refine), len(pre), None)


def choose_batchtopk(activation: BatchTopK, pre: Tensor, refine: Refine | None) -> Chosen:
    """The k * batch largest of all pre-activations [batch, d_sae], as far as they are positive; ties are kept."""
    groups = Groups(pre, activation.k)
    found = _refined(groups.above(_positive(batch_bound(groups, activation.k), refine)), refine)
    n_found, n_kept = len(found.value), activation.k * len(pre)
    smallest = None
    if n_found > n_kept:
        smallest = found.value.kthvalue(n_found - n_kept + 1).values
        found = _only(found, (found.value < smallest).logical_not_())
    n_found = len(found.value)
    found = _on(found, refine)
    if smallest is None or len(found.value) < n_found:  # fewer are positive
        smallest = found.value.amin() if len(found.value) else found.value.new_tensor(torch.inf)
    return _chosen(found, len(pre), smallest)


def choose_jumprelu(activation: JumpReLU, pre: Tensor, threshold: Tensor, refine: Refine | None) -> Chosen:
    """What exceeds its latent's threshold [d_sae], and what is in the window around it, where the threshold learns."""
    groups = Groups(pre, 1, positive=False)
    threshold = threshold.detach()
    bound = threshold - activation.bandwidth / 2
    if refine is not None:
        bound = bound - MARGIN * threshold
    found = _refined(groups.above(bound.to(pre.dtype)), refine)
    on = (found.value <= threshold[found.latent]).logical_not_()
    return _chosen(found, len(pre), None, on)


def _positive(bound: Tensor, refine: Refine | None) -> Tensor:
    """A bound above 0, and lower by the margin where rounded values are compared with it. NaN lets all through."""
    lowered = bound if refine is None else bound * (1 - MARGIN)
    return lowered.nan_to_num(nan=0.0, neginf=0.0).clamp(min=torch.finfo(bound.dtype).tiny)


def _refined(found: Candidates, refine: Refine | None) -> Candidates:
    if refine is None:
        return found
    return Candidates(row=found.row, latent=found.latent, value=refine(found.row, found.latent))


def _on(found: Candidates, refine: Refine | None) -> Candidates:
    """Without those that turned out not to be positive, which only rounded values can hide."""
    return found if refine is None else _only(found, (found.value <= 0).logical_not_())


def _only(found: Candidates, kept: Tensor) -> Candidates:
    places = kept.nonzero().squeeze(1)
    return Candidates(row=found.row[places], latent=found.latent[places], value=found.value[places])


def _chosen(found: Candidates, n_rows: int, smallest: Tensor | None, on: Tensor | None = None) -> Chosen:
    value = found.value if on is None else torch.where(on, found.value, 0.0)
    starts = row_starts(found.row, n_rows)
    entries = Entries(row=found.row, latent=found.latent, value=value, starts=starts)
    return Chosen(entries=entries, smallest=smallest, pre=found.value, on=on)
