"""ood: what is lost when the text shifts."""

import numpy as np

from evaluate.columns import Column
from evaluate.metrics.probing import KS, sparse_scores
from evaluate.subject import Subject

NEEDS_LANGUAGE = True
COLUMNS = {
    **{
        f"ood_gap_to_dense_{k}": Column(
            meaning=f"dense-probe AUC - AUC of {k}-latent probes, both on shifted text",
            better="lower",
            oracle_is_best=True,
            short="gap to dense" if k == 1 else "",
            terminal=k == 1,
        )
        for k in KS
    },
    **{
        f"ood_drop_{k}": Column(
            meaning=f"AUC of {k}-latent probes on the usual text - on shifted text",
            better="lower",
            random_is_worst=False,  # a probe at chance cannot drop
            short="drop" if k == 1 else "",
        )
        for k in KS
    },
    "ood_drop_dense": Column(meaning="the same drop for the dense probe: the model's own share of the gap"),
}


def ood(subject: Subject) -> dict[str, float]:
    """Two gaps per k, on the AUC of `probing`: to the dense probe on shifted text, and from usual to shifted text.

    ood_gap_to_dense = AUC_dense,shifted - AUC_sae,shifted (the paper's sense, arXiv 2502.16681);
    ood_drop = AUC_sae,usual - AUC_sae,shifted. A drop can shrink because the first term falls, so read both.
    """
    language = subject.bench.language
    assert language is not None
    if not language.probe_rows:
        return {}

    def mean(scores: dict[str, dict[str, dict[str, np.ndarray]]], part: str) -> float:
        return float(np.mean([task[part]["auc"].mean() for task in scores.values()]))

    dense = language.dense_scores
    values = {"ood_drop_dense": mean(dense, "test") - mean(dense, "shifted")}
    for k, scores in sparse_scores(subject).items():
        values[f"ood_gap_to_dense_{k}"] = mean(dense, "shifted") - mean(scores, "shifted")
        values[f"ood_drop_{k}"] = mean(scores, "test") - mean(scores, "shifted")
    return values
