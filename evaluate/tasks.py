"""Labelled text to probe on: rows and classes of a task, and what a dense probe on the raw activations gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.seeds import derive_seed
from evaluate.bootstrap import resampled_auc, resampled_counts
from evaluate.probes import Standard, auc, fit_dense, logits, scores_of
from evaluate.rows import Rows

N_PROBE_SEEDS = 3
FIT_ROWS = 1024  # sae-probes: the most rows that a probe is fitted on
TEST_ROWS = 2048  # the most rows that it is scored on
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of dense probes: 1 / C in scikit-learn's words
KEPT_BACK = 5  # one of so many fit rows is kept back to choose the penalty


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledRows:
    """Rows of one part of a task.

    source: the rows that `rows` [n] are numbers of; the same object may serve several tasks. labels: bool
    [n_classes, n], one row a class, this class against the rest.
    """

    source: Rows
    rows: np.ndarray
    labels: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "LabelledRows":
        """Those of the rows, in the order given."""
        return LabelledRows(source=self.source, rows=self.rows[chosen], labels=self.labels[:, chosen])

    def taken(self) -> Rows:
        """The activations of these rows, and their features where they are known."""
        where = torch.from_numpy(self.rows).to(self.source.x.device)
        features = None if self.source.features is None else self.source.features[self.rows]
        return Rows(x=self.source.x[where], features=features)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeData:
    """One task: probes are fitted on `fit`, scored on `test` (same distribution) and, where there is one, `shifted`.

    origin: "embedded" (generated text with known features), "local" (a file of the user) or "sae-probes".
    """

    name: str
    classes: tuple[str, ...]
    fit: LabelledRows
    test: LabelledRows
    shifted: LabelledRows | None = None
    origin: str = "embedded"


def balanced_draw(labels: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """Rising row numbers, an equal share of `most` for each class of bool [n_classes, n] and for the rows of none.

    A class with fewer rows than its share gives all it has; probes weigh the classes equally whatever their numbers.
    """
    groups = [group for group in _strata(labels) if len(group)]
    share = max(1, most // len(groups))
    chosen = [group if len(group) <= share else generator.choice(group, share, replace=False) for group in groups]
    return np.sort(np.concatenate(chosen))


def _strata(labels: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in (*labels, ~labels.any(0))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """The rows that every probe of a task is fitted and scored on: the same for dense and sparse ones.

    fits: one class-balanced draw of up to FIT_ROWS for each probe seed. parts: "test" and, if any, "shifted".
    """

    fits: tuple[LabelledRows, ...]
    parts: Mapping[str, LabelledRows]

    @classmethod
    def of(cls, task: ProbeData, seed: int) -> "Draws":
        def draw(rows: LabelledRows, most: int, *what: int | str) -> LabelledRows:
            generator = np.random.default_rng(derive_seed("evaluate/probe rows", seed, task.name, *what))
            return rows[balanced_draw(rows.labels, most, generator)]

        parts = {"test": task.test} | ({} if task.shifted is None else {"shifted": task.shifted})
        return cls(
            fits=tuple(draw(task.fit, FIT_ROWS, probe_seed) for probe_seed in range(N_PROBE_SEEDS)),
            parts={
                name: draw(rows, TEST_ROWS, name) if len(rows.rows) > TEST_ROWS else rows
                for name, rows in parts.items()
            },
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseTask:
    """One task with the rows drawn for it, and what dense probes on the raw activations say there.

    logits: part -> [n_probe_seeds, n_classes, n]. penalty: the one chosen for all probe seeds.
    """

    task: ProbeData
    draws: Draws
    logits: Mapping[str, np.ndarray]
    penalty: float
    seed: int

    @cached_property
    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """part -> "auc" | "accuracy" -> [n_probe_seeds, n_classes]."""
        return {part: scores_of(values, self.draws.parts[part].labels) for part, values in self.logits.items()}

    @cached_property
    def counts(self) -> Tensor:
        """How often each shifted row is drawn in each resample, [n_resamples, n]: the same for all SAEs."""
        generator = np.random.default_rng(derive_seed("evaluate/bootstrap", self.seed, self.task.name))
        return resampled_counts(self.draws.parts["shifted"].labels, generator)

    @cached_property
    def resampled(self) -> np.ndarray:
        """Mean AUC on each resample of the shifted rows, [n_resamples]."""
        return resampled_auc(self.logits["shifted"], self.draws.parts["shifted"].labels, self.counts)


class DenseScores:
    """What dense probes on raw activations get on every task, computed once for all SAEs; the oracle of probing."""

    def __init__(self, tasks: Sequence[ProbeData]) -> None:
        for name, n in Counter(task.name for task in tasks).items():
            if n > 1:
                raise UserError(f"{n} probe tasks are called '{name}'; a file names its task, so rename a file")
        self._tasks = tasks
        self._found: dict[int, tuple[DenseTask, ...]] = {}

    def of(self, seed: int) -> tuple[DenseTask, ...]:
        """All tasks with the rows that `seed` draws."""
        if seed not in self._found:
            self._found[seed] = tuple(_dense_task(task, seed) for task in self._tasks)
        return self._found[seed]


def _dense_task(task: ProbeData, seed: int) -> DenseTask:
    draws = Draws.of(task, seed)
    parts = {name: rows.taken().x for name, rows in draws.parts.items()}
    penalty = _best_penalty(task, draws, seed)
    found = {name: [] for name in parts}
    for fit in draws.fits:
        for name, values in dense_logits(fit.taken().x, fit.labels, parts, penalty).items():
            found[name].append(values)
    return DenseTask(
        task=task,
        draws=draws,
        logits={name: np.stack(values) for name, values in found.items()},
        penalty=penalty,
        seed=seed,
    )


def dense_logits(x: Tensor, labels: np.ndarray, parts: Mapping[str, Tensor], penalty: float) -> dict[str, np.ndarray]:
    """Fit a probe per class on [n_fit, d_model], and read it on every part [n, d_model]: part -> [n_classes, n]."""
    standard = Standard.of(x)
    weights = fit_dense(standard.apply(x), torch.from_numpy(labels).to(x.device), penalty)
    return {name: logits(standard.apply(part), weights).cpu().numpy() for name, part in parts.items()}


def _best_penalty(task: ProbeData, draws: Draws, seed: int) -> float:
    """The penalty with the best mean AUC on a fifth of each draw kept back; the strongest of equals.

    sae-probes chooses its C by cross-validation, and an oracle that overfits would be none.
    """
    means = np.zeros(len(PENALTIES))
    for probe_seed, fit in enumerate(draws.fits):
        generator = np.random.default_rng(derive_seed("evaluate/probe penalty", seed, task.name, probe_seed))
        means += _kept_back_auc(fit.taken().x, fit.labels, generator)
    return max(zip(means.tolist(), PENALTIES, strict=True))[1]


def _kept_back_auc(x: Tensor, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Mean AUC over classes on the rows kept back, for each penalty; zeros where no class has any there."""
    back = np.zeros(len(x), dtype=bool)
    for group in _strata(labels):
        back[generator.permutation(group)[: len(group) // KEPT_BACK]] = True
    usable = (labels[:, back].any(1)) & (~labels[:, back]).any(1)
    if not usable.any():
        return np.zeros(len(PENALTIES))
    kept, held = (torch.from_numpy(np.flatnonzero(chosen)).to(x.device) for chosen in (~back, back))
    fitted, scored = labels[usable][:, ~back], labels[usable][:, back]
    found = [dense_logits(x[kept], fitted, {"back": x[held]}, penalty)["back"] for penalty in PENALTIES]
    return np.array([auc(said, scored).mean() for said in found])
