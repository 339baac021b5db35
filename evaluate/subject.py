"""Subject: one dictionary under test, with everything a metric may read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluate.language import Language
from evaluate.masked_language import MaskedLanguage
from evaluate.rows import Rows
from evaluate.spelling import Spelling
from evaluate.splicing import Splice
from evaluate.tasks import DenseScores, ProbeData
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


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of the model that the cache was made with; n_parameters is 0 where it was not loaded."""

    id: str = ""
    n_parameters: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """The data shared by all runs of one cache and hook point.

    calibration: clean held-out rows to set thresholds on. clean: other clean held-out rows, to score.
    masked: the masked variant of the scored rows; replaced: [n] true where the input token itself was replaced.
    shifted: rows of text from another distribution, without labels. tasks: labelled text to probe on.
    language: ground truth, for the embedded model only. masked_language: the same text clean and masked, with truth.
    splice, splice_shifted: the model with test windows, to put reconstructions into. spelling: first-letter prompts.
    model: what is known of the model. facts: what decides all of this, as JSON, to tell whether a measurement is still
    good. missing: sentences on what cannot be measured here, and why.
    """

    calibration: Rows
    clean: Rows
    masked: Rows | None = None
    replaced: np.ndarray | None = None
    shifted: Rows | None = None
    tasks: tuple[ProbeData, ...] = ()
    language: Language | None = None
    masked_language: MaskedLanguage | None = None
    splice: Splice | None = None
    splice_shifted: Splice | None = None
    spelling: Spelling | None = None
    model: ModelFacts = field(default_factory=lambda: ModelFacts())
    facts: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @cached_property
    def dense(self) -> DenseScores:
        """Dense probes on the raw activations of every task: the oracle of probing, fitted once for all runs."""
        return DenseScores(self.tasks)


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """One dictionary and the data it is measured on; a metric is a function of this.

    dictionary: with the threshold set for the matched L0. raw: as trained (the same object when nothing was matched).
    held_out: the clean rows to score; the oracle, which reads labels, has the labelled test text here.
    seed: decides what a metric draws (probe rows, sampled latents). peers: decoders [d_sae, d_model] of the same recipe
    trained with other seeds.
    """

    name: str
    dictionary: Dictionary
    raw: Dictionary
    bench: Bench
    held_out: Rows
    seed: int = 0
    peers: tuple[Tensor, ...] = ()
    _latents: dict[int, Tensor] = field(default_factory=dict)

    def latents(self, rows: Rows) -> Tensor:
        """Latents [n, d_sae] of some rows of the bench, computed once for each Rows object."""
        if id(rows) not in self._latents:
            self._latents[id(rows)] = torch.cat([self.dictionary.encode(part) for part in chunks(rows)])
        return self._latents[id(rows)]


def chunks(rows: Rows, n: int = CHUNK_ROWS) -> Iterator[Rows]:
    """Consecutive pieces of at most `n` rows (activations and features only)."""
    for start in range(0, rows.n, n):
        features = None if rows.features is None else rows.features[start : start + n]
        yield Rows(x=rows.x[start : start + n], features=features)


def matched_threshold(sae: SparseAutoencoder, calibration: Rows, k: float) -> Tensor:
    """The SAE's own thresholds, all moved by one amount, so that its mean L0 on the calibration rows equals k."""
    return threshold_for_l0(sae, (rows.x for rows in chunks(calibration, 2048)), k, calibration.n)
