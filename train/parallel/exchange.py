"""The largest values of all processes, exactly: each sends candidates, and all choose among the same ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from train.parallel.axis import Axis


@torch.no_grad()
def nth_largest(values: Tensor, n: int, axis: Axis, kth: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The n-th largest of the values of all processes, a scalar; `kth` finds it among the values of one.

    Each has at least its share of the n above its own share-th largest, so together they have n above the least of
    these: only what reaches it is sent, which is little more than n values in all where the parts are alike.
    """
    if axis.size == 1:
        return kth(values, n)
    flat = values.reshape(-1)
    bound = axis.least(kth(flat, -(-n // axis.size)))
    sent = flat[(flat < bound).logical_not_()]  # NaN is sent too: it counts as the largest
    if len(sent) > n:
        sent = sent.topk(n, sorted=False).values
    width = int(axis.largest(sent.new_tensor(len(sent), dtype=torch.int64)))
    padded = sent.new_full((width,), -torch.inf)
    padded[: len(sent)] = sent
    return kth(axis.gather(padded).flatten(), n)


def largest_in_rows(values: Tensor, n: int, axis: Axis, *, alike: bool = False) -> tuple[Tensor, Tensor]:
    """Of each row the n largest, over the columns of all processes: (values, columns), both [rows, at most n].

    `values` [rows, columns] are this process's columns, and so is what comes back: a value that is not among the n
    is 0, with no gradient. There are at least n columns in all. With `alike`, for a small n and as many columns on
    each process, all n are sent at once; else the processes first agree on how few will do.
    """
    if axis.size == 1:
        return values.topk(n, dim=-1, sorted=False)
    own = min(n, values.shape[1])
    largest, columns = values.topk(own, dim=-1, sorted=not alike)
    with torch.no_grad():
        width = own if alike else _width_of_all(largest.detach(), n, axis)
        own = min(own, width)
        padded = values.new_full((len(values), width), -torch.inf)
        padded[:, :own] = largest[:, :own]
        candidates = torch.cat(list(axis.gather(padded)), dim=1)
        best = candidates.topk(n, dim=1, sorted=False).indices  # the same on all: they choose among the same values
        kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, best, True)
        mine = kept[:, axis.index * width : axis.index * width + own]
    return torch.where(mine, largest[:, :own], 0.0), columns[:, :own]


def _width_of_all(largest: Tensor, n: int, axis: Axis) -> int:
    """How many of its largest values of a row, `largest` in falling order, a process may have among the n of all.

    As in `nth_largest`: what is below every process's share-th largest is not among them.
    """
    share = -(-n // axis.size)
    has_share = largest.shape[1] >= share
    own_bound = largest[:, share - 1] if has_share else largest.new_full((len(largest),), -torch.inf)
    n_sent = (largest < axis.least(own_bound).unsqueeze(1)).logical_not_().sum(dim=1)  # NaN is sent too
    # where the others have few, this one may have to send more than its share to make n
    return int(axis.largest(n_sent.max()))
