"""Search for the few large values in many, by the maxima of groups.

The k-th largest of k or more groups' maxima is a lower bound of the k-th largest value, for k values reach it; with
four times k groups about 1.15 k values do. So a pass over all values for the maxima, and a look into the groups whose
maximum reaches the bound, find what a sort of everything would. NaN counts as the largest, so that it is seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 16  # values; fewer where k is large
COARSE = 4  # groups a wanted value, for the bound


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Values that may be wanted, with their places; by rising row."""

    row: Tensor
    """[n] int64"""
    latent: Tensor
    """[n] int64"""
    value: Tensor
    """[n]"""


class Groups:
    """Values [batch, d_sae] and the maxima of groups of them, a row at a time.

    With `positive` only values above 0 are looked for, which is all that bfloat16's maxima are right for.
    """

    def __init__(self, values: Tensor, k: int, *, positive: bool = True) -> None:
        n_rows, d_sae = values.shape
        size = GROUP
        while size > 1 and (d_sae % size or d_sae // size < COARSE * k):
            size //= 2
        self.n_rows = n_rows
        self._as_integers = positive and values.dtype == torch.bfloat16 and values.device.type == "cpu"
        self._values = values.view(n_rows, size, d_sae // size)  # latents of one group lie d_sae / size apart
        self._maxima = self._largest(self._values) if size > 1 else values

    def coarse(self, k: int) -> Tensor:
        """[batch, n]: maxima of larger groups, at least 4 k of them in a row if there are so many."""
        n = self._maxima.shape[1]
        join = 1
        while n % (2 * join) == 0 and n // (2 * join) >= COARSE * k:
            join *= 2
        if join == 1:
            return self._maxima
        return self._largest(self._maxima.view(self.n_rows, join, n // join))

    def above(self, bound: Tensor) -> Candidates:
        """All values that are not below a bound: a scalar, one for each latent [d_sae], or for each row [batch, 1]."""
        size, n_groups = self._values.shape[1:]
        of_latent = bound.view(size, n_groups) if bound.ndim == 1 else None
        of_group = bound if of_latent is None else of_latent.amin(0)
        row, group = self._below(of_group).logical_not_().nonzero().unbind(1)
        opened = self._values[row, :, group]  # [n_hit, size]
        bounds = of_latent[:, group].t() if of_latent is not None else bound[row] if bound.ndim else bound
        place, member = (opened < bounds).logical_not_().nonzero().unbind(1)
        return Candidates(row=row[place], latent=group[place] + member * n_groups, value=opened[place, member])

    def _below(self, bound: Tensor) -> Tensor:
        """[batch, n_groups] bool: which maxima are below a bound of their type."""
        if self._as_integers:
            return self._maxima.view(torch.int16) < bound.view(torch.int16)
        return self._maxima < bound

    def _largest(self, values: Tensor) -> Tensor:
        """[batch, size, n] -> [batch, n]. bfloat16 goes as the integers that its bits are, several times faster on a
        CPU: the same order where values are positive; among negative ones it gives some negative one."""
        if self._as_integers:
            return values.view(torch.int16).amax(1).view(torch.bfloat16)
        return values.amax(1)


def row_bounds(groups: Groups, k: int) -> Tensor:
    """[batch, 1]: a lower bound of the k-th largest value of each row; infinitely low if a row has fewer groups."""
    coarse = groups.coarse(k)
    if coarse.shape[1] < k:
        return coarse.new_full((groups.n_rows, 1), -torch.inf)
    return coarse.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def batch_bound(groups: Groups, k: int) -> Tensor:
    """A scalar: a lower bound of the (k * batch)-th largest value of all."""
    coarse = groups.coarse(k).flatten()
    n_wanted = k * groups.n_rows
    if coarse.numel() < n_wanted:
        return coarse.new_tensor(-torch.inf)
    return coarse.kthvalue(coarse.numel() - n_wanted + 1).values
