"""Products of a table's rows with sparse weights, by the operations that torch has for embeddings.

They read each row that is named once, keep nothing of the size of all of them, and add in the order given, so the same
input gives the same bits, however many threads there are.
"""

import torch
from torch import Tensor
from torch.nn import functional


def weighted_sums(table: Tensor, index: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """[n_sums, width]: sum j of weight[i] * table[index[i]] over i from starts[j] to starts[j + 1].

    table [n_rows, width]; index, weight [n]; starts [n_sums], never falling. An empty sum is 0.
    """
    return functional.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight)


def dots(left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor) -> Tensor:
    """[n]: the products of left[left_index[i]] and right[right_index[i]], for tables of one width and n numbers each.

    It is the gradient of `weighted_sums` with respect to the weights, for which torch has a kernel of its own.
    """
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    none = left_index.new_zeros(1)  # the sums' starts, which this mode does not look at
    return backward(left, right, right_index, none, left_index, 0)


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """[n]: the products of the rows of two tables [n, width], several times faster than a product and a sum."""
    rows = torch.arange(len(left), device=left.device)
    return dots(left, rows, right, rows)
