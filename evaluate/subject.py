"""Subject: one dictionary under test, with everything a metric may read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evaluate.language import Language
from evaluate.rows import Rows
from evaluate.splicing import Splice
from train.calibration import threshold_for_l0
from train.sae import SparseAutoencoder

CHUNK_ROWS = 8192


class Dictionary(Protocol):
    """What is under test: unit-free latents, and directions to add them up with."""

    @property
    def directions(self) -> Tensor:
        """[d_sae, d_model]."""
        ...

    @property
    def offset(self) -> Tensor:
        """[d_model], what is reconstructed when every latent is 0."""
        ...

    def encode(self, rows: Rows) -> Tensor:
        """[n, d_sae], zero where a latent is off."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[n, d_sae] -> [n, d_model]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """A sparse autoencoder as a Dictionary."""

    sae: SparseAutoencoder

    @property
    def directions(self) -> Tensor:
        return self.sae.W_dec.detach()

    @property
    def offset(self) -> Tensor:
        return self.sae.b_dec.detach()

    @torch.no_grad()
    def encode(self, rows: Rows) -> Tensor:
        return self.sae.encode(rows.x)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.sae.decode(latents)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """The data shared by all runs of one cache and hook point.

    calibration: clean held-out rows to set thresholds on. clean: other clean held-out rows, to score.
    masked: the masked variant of the scored rows; replaced: [n] true where the input token itself was replaced.
    language: ground truth, for the embedded model only. splice: the model, to put reconstructions into.
    missing: sentences on what cannot be measured here, and why.
    """

    calibration: Rows
    clean: Rows
    masked: Rows | None = None
    replaced: np.ndarray | None = None
    language: Language | None = None
    splice: Splice | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """One dictionary and the data it is measured on; a metric is a function of this.

    dictionary: with the threshold set for the matched L0. raw: as trained (the same object when nothing was matched).
    held_out: the clean rows to score; the oracle, which reads labels, has the labelled test text here.
    """

    name: str
    dictionary: Dictionary
    raw: Dictionary
    bench: Bench
    held_out: Rows
    _latents: dict[str, Tensor] = field(default_factory=dict)

    def latents(self, part: str) -> Tensor:
        """Latents [n, d_sae] of one labelled corpus ("fit", "test", "shifted"), computed once."""
        if part not in self._latents:
            language = self.bench.language
            assert language is not None, "ask for labelled text only where there is some"
            self._latents[part] = torch.cat([self.dictionary.encode(rows) for rows in chunks(language.part(part))])
        return self._latents[part]


def chunks(rows: Rows, n: int = CHUNK_ROWS) -> Iterator[Rows]:
    """Consecutive pieces of at most `n` rows (activations and features only)."""
    for start in range(0, rows.n, n):
        features = None if rows.features is None else rows.features[start : start + n]
        yield Rows(x=rows.x[start : start + n], features=features)


def matched_threshold(sae: SparseAutoencoder, calibration: Rows, k: float) -> Tensor:
    """The SAE's own thresholds, all moved by one amount, so that its mean L0 on the calibration rows equals k."""
    return threshold_for_l0(sae, (rows.x for rows in chunks(calibration, 2048)), k, calibration.n)
