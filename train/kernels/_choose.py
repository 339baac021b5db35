"""Which codes are on: the rules of train/activations.py, applied to the few values that may be wanted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.activations import BatchTopK, JumpReLU, TopK
from train.kernels._entries import Entries, row_starts
from train.kernels._search import Candidates, Groups, batch_bound, row_bounds

MARGIN = 1 / 64
"""Of a bound, as a share: what bfloat16 may have put so far below it by rounding is a candidate too: three standard
deviations, and more where rows are wide."""
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
    groups, k, n_rows = Groups(pre, activation.k), activation.k, len(pre)
    found = groups.above(_positive(row_bounds(groups, k), refine))
    if refine is not None:
        padded, _ = _padded(found, n_rows, k)
        bound = _positive(padded.topk(k, dim=1, sorted=False).values.amin(1), refine)
        found = _refined(_only(found, (found.value < bound[found.row]).logical_not_()), refine)
    padded, starts = _padded(found, n_rows, k)
    if padded.shape[1] > k:
        best = padded.topk(k, dim=1, sorted=False).indices
        kept = torch.zeros(n_rows * padded.shape[1], dtype=torch.bool, device=pre.device)
        kept[(best + padded.shape[1] * torch.arange(n_rows, device=pre.device).unsqueeze(1)).flatten()] = True
        found = _only(found, kept[_place(found, starts, padded)])
    return _chosen(_on(found, refine), n_rows, None)


def choose_batchtopk(activation: BatchTopK, pre: Tensor, refine: Refine | None) -> Chosen:
    """The k * batch largest of all pre-activations [batch, d_sae], as far as they are positive; ties are kept."""
    groups, n_kept = Groups(pre, activation.k), activation.k * len(pre)
    found = groups.above(_positive(batch_bound(groups, activation.k), refine))
    if refine is not None:
        if (bound := _nth_largest(found.value, n_kept)) is not None:
            found = _only(found, (found.value < _positive(bound, refine)).logical_not_())
        found = _refined(found, refine)
    smallest = _nth_largest(found.value, n_kept)
    if smallest is not None:
        found = _only(found, (found.value < smallest).logical_not_())
    n_found, found = len(found.value), _on(found, refine)
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


def _nth_largest(values: Tensor, n: int) -> Tensor | None:
    """A scalar; None if there are no more than n values."""
    return values.kthvalue(len(values) - n + 1).values if len(values) > n else None


def _padded(found: Candidates, n_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """The candidates as rows [n_rows, at least k] with minus infinity behind them, and where rows start [n_rows]."""
    starts = row_starts(found.row, n_rows)
    counts = torch.diff(starts, append=starts.new_tensor([len(found.row)]))
    padded = found.value.new_full((n_rows, max(k, int(counts.max()))), -torch.inf)
    padded.view(-1)[_place(found, starts, padded)] = found.value
    return padded, starts


def _place(found: Candidates, starts: Tensor, padded: Tensor) -> Tensor:
    """[n]: each candidate's place in the flattened rows."""
    shift = padded.shape[1] * torch.arange(len(starts), device=starts.device) - starts
    return torch.arange(len(found.row), device=starts.device) + shift[found.row]


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
