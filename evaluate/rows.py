"""Rows: activations together with what is known about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Activations `x` [n, d_model] float32 and, for generated text, the labels of every row.

    attributes: name -> [n] integers, -1 where the attribute is undefined.
    positions: name -> [n] booleans, the rows a relation or a probe task is read at.
    features: [n, n_features] booleans, the ground-truth features that are on; None when not known.
    """

    x: Tensor
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)
    positions: Mapping[str, np.ndarray] = field(default_factory=dict)
    features: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.x)


def class_labels(rows: Rows, attribute: str, positions: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers at `positions` where `attribute` is defined, and its value there: two arrays [n_chosen]."""
    values = rows.attributes[attribute]
    chosen = np.flatnonzero(rows.positions[positions] & (values >= 0))
    return chosen, values[chosen].astype(np.int64)
