"""What sparse probes on a dictionary's latents say of the test rows: read by probing and by ood."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from evaluate.latent_choice import by_scaled_difference, gather, mean_nonzero
from evaluate.probes import fit_logistic, scores_of
from evaluate.rows import Rows
from evaluate.subject import Subject, chunks
from evaluate.tasks import DenseTask, dense_logits

KS = (1, 2, 5, 16, 128)
MAX_NUMBERS = 2**26  # latents held at a time: 256 MiB


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskScores:
    """One task: the dense probes, and those on the latents and on the reconstruction of the same rows.

    sparse: k -> part -> logits [n_probe_seeds, n_classes, n]; rebuilt: part -> the same.
    """

    dense: DenseTask
    sparse: Mapping[int, Mapping[str, np.ndarray]]
    rebuilt: Mapping[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.dense.task.name

    @cached_property
    def scores(self) -> dict[int, dict[str, dict[str, np.ndarray]]]:
        """k -> part -> "auc" | "accuracy" -> [n_probe_seeds, n_classes]."""
        return {k: self._scored(parts) for k, parts in self.sparse.items()}

    @cached_property
    def rebuilt_scores(self) -> dict[str, dict[str, np.ndarray]]:
        """The same for dense probes on reconstructions."""
        return self._scored(self.rebuilt)

    def _scored(self, parts: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        return {part: scores_of(values, self.dense.draws.parts[part].labels) for part, values in parts.items()}


@lru_cache(maxsize=1)  # probing and ood ask for the same subject one after the other
def probe_scores(subject: Subject) -> tuple[TaskScores, ...]:
    """Fit and read all probes of every task on the rows that the subject's seed draws.

    The oracle reads labels, which the user's own text has not: it gets the tasks of the labelled text alone.
    """
    reads_labels = subject.held_out is not subject.bench.clean
    return tuple(
        _task_scores(subject, dense)
        for dense in subject.bench.dense.of(subject.seed)
        if not reads_labels or dense.task.test.source.features is not None
    )


def _task_scores(subject: Subject, dense: DenseTask) -> TaskScores:
    probes, rebuilt_fits = [], []
    for fit in dense.draws.fits:
        latents = subject.dictionary.encode(fit.taken())
        probes.append(_Probes.fit(latents, torch.from_numpy(fit.labels).to(latents.device)))
        rebuilt_fits.append(subject.dictionary.decode(latents))
    together = torch.cat([probe.weights for probe in probes], dim=1)
    shape = (len(probes), len(KS), -1)
    sparse, rebuilt = {}, {}
    for part, rows in dense.draws.parts.items():
        said, rebuilt[part] = _read(subject, rows.taken(), together)
        intercepts = torch.cat([probe.intercepts for probe in probes])
        sparse[part] = (said + intercepts).T.reshape(*shape, len(said)).cpu().numpy()
    found = [
        dense_logits(x, fit.labels, rebuilt, dense.penalty)
        for x, fit in zip(rebuilt_fits, dense.draws.fits, strict=True)
    ]
    return TaskScores(
        dense=dense,
        sparse={k: {part: values[:, i] for part, values in sparse.items()} for i, k in enumerate(KS)},
        rebuilt={part: np.stack([logits[part] for logits in found]) for part in rebuilt},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Probes:
    """The probes of one draw for every k and class: weights [d_sae, n_ks * n_classes] on plain latents, intercepts."""

    weights: Tensor
    intercepts: Tensor

    @classmethod
    def fit(cls, latents: Tensor, labels: Tensor) -> "_Probes":
        """[n, d_sae], bool [n_classes, n]. Each k takes the first of the same latents, all where there are fewer."""
        scale = mean_nonzero(latents)
        chosen = by_scaled_difference(latents, scale, labels, max(KS))
        features = gather(latents, chosen) / scale[chosen].unsqueeze(1)
        weights, intercepts = latents.new_zeros(len(KS), len(labels), latents.shape[1]), []
        for i, k in enumerate(KS):
            found = fit_logistic(features[..., :k], labels).to(latents.dtype)
            weights[i].scatter_(1, chosen[:, :k], found[:, :-1] / scale[chosen[:, :k]])
            intercepts.append(found[:, -1])
        return cls(weights=weights.flatten(0, 1).T, intercepts=torch.cat(intercepts))


def _read(subject: Subject, rows: Rows, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Latents @ weights [n, n_probes] and reconstructions [n, d_model], a chunk at a time."""
    said, rebuilt = [], []
    for part in chunks(rows, max(1, MAX_NUMBERS // len(weights))):
        latents = subject.dictionary.encode(part)
        said.append(latents @ weights)
        rebuilt.append(subject.dictionary.decode(latents))
    return torch.cat(said), torch.cat(rebuilt)
