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
from evaluate.probes import Standard, auc, balanced_accuracy, f1_score, fit_dense, logits, one_hot
from evaluate.rows import Rows, class_labels

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
    """The rows of one probe task in one part: row numbers [n] and one-vs-rest labels, bool [classes, n]."""

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
    def probe_rows(self) -> dict[str, dict[str, TaskRows]]:
        """task name -> part name -> rows and labels, for the classes frequent enough in all three parts.

        A task without such a class is left out.
        """
        found = {task.name: self._task_rows(task) for task in self.tasks}
        return {name: parts for name, parts in found.items() if len(parts["fit"].labels)}

    def _task_rows(self, task: ProbeTask) -> dict[str, TaskRows]:
        chosen = {
            part: self._sample(*class_labels(self.part(part), task.attribute, task.positions), PROBE_ROWS, task.name)
            for part in ("fit", "test", "shifted")
        }
        classes = np.unique(chosen["fit"][1])
        labels = {part: one_hot(values, classes) for part, (_, values) in chosen.items()}
        common = np.all([(y.sum(1) >= MIN_POSITIVES) & ((~y).sum(1) >= MIN_POSITIVES) for y in labels.values()], axis=0)
        return {part: TaskRows(rows=chosen[part][0], labels=labels[part][common]) for part in chosen}

    def _sample(self, rows: np.ndarray, values: np.ndarray, most: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        if len(rows) <= most:
            return rows, values
        generator = np.random.default_rng(derive_seed("evaluate/probe rows", self.seed, purpose))
        kept = np.sort(generator.choice(len(rows), most, replace=False))
        return rows[kept], values[kept]

    @cached_property
    def dense_scores(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """task -> part -> "auc" | "balanced_accuracy" -> [classes]: a dense probe on the raw activations.

        This is the oracle of out-of-distribution probing: what a linear probe gets from the whole activation.
        """
        scores: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        for name, parts in self.probe_rows.items():
            x = self.fit.x[parts["fit"].rows]
            standard = Standard.of(x)
            weights = fit_dense(standard.apply(x), torch.from_numpy(parts["fit"].labels).to(x.device))
            scores[name] = {
                part: scores_of(
                    logits(standard.apply(self.part(part).x[parts[part].rows]), weights), parts[part].labels
                )
                for part in ("test", "shifted")
            }
        return scores

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


def scores_of(score: Tensor, labels: np.ndarray) -> dict[str, np.ndarray]:
    """AUC and balanced accuracy of probe logits [classes, n] against bool [classes, n]: name -> [classes]."""
    values = score.cpu().numpy()
    return {"auc": auc(values, labels), "balanced_accuracy": balanced_accuracy(values > 0, labels)}
