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
    is 0, with no gradient. There are at least n columns in all; with `alike`, as many on each process.
    """
    if axis.size == 1:
        return values.topk(n, dim=-1, sorted=False)
    own = min(n, values.shape[1])
    largest, columns = values.topk(own, dim=-1, sorted=False)
    width = own if alike else int(axis.largest(torch.tensor(own, device=values.device)))
    with torch.no_grad():
        padded = values.new_full((len(values), width), -torch.inf)
        padded[:, :own] = largest
        candidates = torch.cat(list(axis.gather(padded)), dim=1)
        best = candidates.topk(n, dim=1, sorted=False).indices  # the same on all: they choose among the same values
        kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, best, True)
        mine = kept[:, axis.index * width : axis.index * width + own]
    return torch.where(mine, largest, 0.0), columns
