"""Language: the generated text a dictionary is probed on, with its ground truth and its dense probes.

Everything here depends on the model and the text alone, so it is made once and shared by all runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cache_spec.seeds import derive_seed
from evaluate.probes import Standard, f1_score, fit_dense, logits, one_hot
from evaluate.rows import Rows, class_labels
from evaluate.tasks import LabelledRows, ProbeData
from evaluate.truth import Truth

EVERYWHERE = "everywhere"  # the position name of an even sample over all tokens
PROBE_ROWS = 8192  # most rows one probe is fitted or tested on
PARENT_ROWS = 24576  # most rows absorption is measured on, per relation: children are rarer than parents
MIN_POSITIVES = 20  # a class with fewer rows in any part is not probed
MIN_PARENT_F1 = 0.6  # SAEBench leaves out a parent whose dense probe is worse


class Relation(Protocol):
    """Parent and child attributes read at the same positions (harvest.embedded.Relation has this shape)."""

    @property
    def family(self) -> str: ...
    @property
    def parent(self) -> str: ...
    @property
    def child(self) -> str: ...
    @property
    def positions(self) -> str: ...


class ProbeTask(Protocol):
    """One attribute to predict at some positions (harvest.embedded.ProbeTask has this shape)."""

    @property
    def name(self) -> str: ...
    @property
    def attribute(self) -> str: ...
    @property
    def positions(self) -> str: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRows:
    """Rows to choose latents on: row numbers [n] and one-vs-rest labels, bool [classes, n]."""

    rows: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Parents:
    """All usable parents of one relation.

    classes: [n_parents] parent values. directions: [n_parents, d_model] unit vectors of their dense probes.
    fit: rows to choose latents on. rows, right: test rows [n] and bool [n_parents, n], true where the parent is on and
    its dense probe says so. on: bool [n_parents, n]. child: [n] child value of each test row, -1 for none.
    """

    relation: Relation
    classes: np.ndarray
    directions: Tensor
    fit: TaskRows
    rows: np.ndarray
    on: np.ndarray
    right: np.ndarray
    child: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Language:
    """Three corpora with labels: probes are fitted on `fit`, scored on `test` (same distribution) and `shifted`.

    even: an even sample of all tokens of the fit text, which the oracle's directions are fitted on.
    """

    fit: Rows
    test: Rows
    shifted: Rows
    even: Rows
    relations: Sequence[Relation]
    tasks: Sequence[ProbeTask]
    value_names: Mapping[str, Sequence[str]]
    feature_names: Sequence[str]
    seed: int

    def part(self, name: str) -> Rows:
        """The corpus called "fit", "test" or "shifted"."""
        return {"fit": self.fit, "test": self.test, "shifted": self.shifted}[name]

    @cached_property
    def probe_data(self) -> tuple[ProbeData, ...]:
        """The probe tasks, with the classes frequent enough in all three parts; a task without one is left out."""
        found = (self._probe_data(task) for task in self.tasks)
        return tuple(task for task in found if task.classes)

    def _probe_data(self, task: ProbeTask) -> ProbeData:
        chosen = {
            part: class_labels(self.part(part), task.attribute, task.positions) for part in ("fit", "test", "shifted")
        }
        classes = np.unique(chosen["fit"][1])
        labels = {part: one_hot(values, classes) for part, (_, values) in chosen.items()}
        common = np.all([(y.sum(1) >= MIN_POSITIVES) & ((~y).sum(1) >= MIN_POSITIVES) for y in labels.values()], axis=0)
        if len(classes) == common.sum() == 2:
            common[0] = False  # two classes are one question, and the second asks it
        names = self.value_names[task.attribute]
        parts = {
            part: LabelledRows(source=self.part(part), rows=rows, labels=labels[part][common])
            for part, (rows, _) in chosen.items()
        }
        return ProbeData(
            name=task.name,
            classes=tuple(names[int(value)] for value in classes[common]),
            fit=parts["fit"],
            test=parts["test"],
            shifted=parts["shifted"],
        )

    def _sample(self, rows: np.ndarray, values: np.ndarray, most: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        if len(rows) <= most:
            return rows, values
        generator = np.random.default_rng(derive_seed("evaluate/probe rows", self.seed, purpose))
        kept = np.sort(generator.choice(len(rows), most, replace=False))
        return rows[kept], values[kept]

    @cached_property
    def truth(self) -> Truth:
        """The directions of the features, and which of them go together."""
        return Truth.of(self.even, self.feature_names)

    @cached_property
    def parents(self) -> tuple[Parents, ...]:
        """The usable parents of every relation that has any, with their dense-probe directions."""
        found = [self._parents(relation) for relation in self.relations]
        return tuple(parents for parents in found if parents is not None and len(parents.classes))

    def _parents(self, relation: Relation) -> Parents | None:
        purpose = f"{relation.family}/{relation.parent}/{relation.child}/{relation.positions}"
        fit_rows, fit_values = self._sample(
            *class_labels(self.fit, relation.parent, relation.positions), PROBE_ROWS, purpose
        )
        rows, values = self._sample(*class_labels(self.test, relation.parent, relation.positions), PARENT_ROWS, purpose)
        classes = np.unique(fit_values)
        fit_labels, on = one_hot(fit_values, classes), one_hot(values, classes)
        usable = (fit_labels.sum(1) >= MIN_POSITIVES) & (on.sum(1) >= MIN_POSITIVES)
        usable &= (~fit_labels).sum(1) >= MIN_POSITIVES
        classes, fit_labels, on = classes[usable], fit_labels[usable], on[usable]
        if not len(classes):
            return None

        x = self.fit.x[fit_rows]
        standard = Standard.of(x)
        weights = fit_dense(standard.apply(x), torch.from_numpy(fit_labels).to(x.device))
        says = (logits(standard.apply(self.test.x[rows]), weights) > 0).cpu().numpy()
        good = f1_score(says, on) > MIN_PARENT_F1
        directions = (weights[:, :-1] / standard.std).to(x.dtype)
        directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return Parents(
            relation=relation,
            classes=classes[good],
            directions=directions[torch.from_numpy(good).to(directions.device)],
            fit=TaskRows(rows=fit_rows, labels=fit_labels[good]),
            rows=rows,
            on=on[good],
            right=(on & says)[good],
            child=self.test.attributes[relation.child][rows].astype(np.int64),
        )
