"""probing: what a linear probe on the best few latents can tell."""

from collections.abc import Mapping

import numpy as np

from evaluate.columns import Column
from evaluate.names import Measurements
from evaluate.probe_scores import KS, probe_scores
from evaluate.subject import Subject

NEEDS = ("tasks",)
WANTS = ()

TAILS = {"test": ("", "text like the training text"), "shifted": ("_shifted", "shifted text")}
WORDS = {"auc": "AUC", "accuracy": "balanced accuracy"}


def _columns() -> dict[str, Column]:
    columns = {}
    for tail, where in TAILS.values():
        for score, words in WORDS.items():
            for k in KS:
                columns[f"sae_top_{k}_test_{score}{tail}"] = Column(
                    meaning=f"{words} of probes on the best {k} latent{'s' * (k > 1)}, on {where}",
                    better="higher",
                    claim=score == "auc" and k in (1, 16) and not tail,
                    oracle_is_best=True,
                    short=f"AUC{k}" if score == "auc" and k in (1, 16, 128) and not tail else "",
                    terminal=score == "auc" and k == 1 and not tail,  # the shifted one is in the gap to the dense probe
                )
            columns[f"llm_test_{score}{tail}"] = Column(
                meaning=f"{words} of a dense probe on the raw activations, on {where}"
            )
        columns[f"reconstruction_test_auc{tail}"] = Column(
            meaning=f"AUC of a dense probe on reconstructions, on {where}", better="higher"
        )
    for k in KS:
        columns[f"probe_seed_sd_{k}"] = Column(
            meaning=f"standard deviation of sae_top_{k}_test_auc over the draws of rows that probes are fitted on"
        )
    return columns


COLUMNS = _columns()


def probing(subject: Subject) -> Measurements:
    """k-sparse probing of every task in the manner of sae-probes (Kantamneni et al., arXiv 2502.16681).

    One against the rest per class. Three draws (probe seeds) of up to 1,024 class-balanced fit rows; on each draw every
    latent is divided by its mean nonzero activation, the k with the largest |difference of class means| are chosen, and
    a class-balanced logistic probe on them is scored by AUC and balanced accuracy; mean over classes, then draws, then
    tasks. Ours is a ridge probe with scikit-learn's C = 1; sae-probes fits an L1 probe whose C is cross-validated, so
    for k = 128 the numbers may differ a little. `llm_test_*` (SAEBench's name) is a dense probe on the raw activations,
    `reconstruction_test_auc` one on reconstructions of the same rows with the same penalty; both are fitted on the same
    draws.
    """
    tasks = probe_scores(subject)
    values: Measurements = {}
    for part, (tail, _) in TAILS.items():
        there = [task for task in tasks if part in task.rebuilt]
        for score in WORDS:
            for k in KS:
                values |= _mean(f"sae_top_{k}_test_{score}{tail}", {t.name: t.scores[k][part][score] for t in there})
            values |= _mean(f"llm_test_{score}{tail}", {t.name: t.dense.scores[part][score] for t in there})
        values |= _mean(f"reconstruction_test_auc{tail}", {t.name: t.rebuilt_scores[part]["auc"] for t in there})
    if tasks:
        for k in KS:
            by_draw = np.mean([task.scores[k]["test"]["auc"].mean(1) for task in tasks], axis=0)  # [n_probe_seeds]
            values[f"probe_seed_sd_{k}"] = float(np.std(by_draw, ddof=1))
    return values


def _mean(name: str, by_task: Mapping[str, np.ndarray]) -> Measurements:
    """The mean over tasks of [n_probe_seeds, n_classes], and that of each task as a part; nothing without a task."""
    parts = {f"{name}@{task}": float(scores.mean()) for task, scores in by_task.items()}
    return {name: float(np.mean(list(parts.values()))), **parts} if parts else {}
