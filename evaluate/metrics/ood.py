"""ood: what is lost when the text shifts."""

from collections.abc import Mapping, Sequence

import numpy as np

from evaluate.bootstrap import resampled_auc
from evaluate.columns import Column
from evaluate.names import Measurements
from evaluate.probe_scores import probe_scores
from evaluate.subject import Subject

OOD_KS = (1, 16, 128)


_NO_DROP = "a probe at chance cannot drop, so a smaller drop may be a worse probe"


def _columns() -> dict[str, Column]:
    columns = {}
    for k in OOD_KS:
        latents = f"{k} latent{'s' * (k > 1)}"
        gap = f"dense-probe AUC - AUC of probes on the best {latents}, both on shifted text"
        columns[f"ood_gap_to_dense_{k}"] = Column(
            meaning=gap,
            better="lower",
            claim=k == 16,
            oracle_is_best=True,
            short=f"gap to dense {k}" if k in (1, 16) else "",
            terminal=k == 16,
        )
        for end, words in (("low", "2.5th"), ("high", "97.5th")):
            columns[f"ood_gap_to_dense_{k}_{end}"] = Column(
                meaning=f"{words} percentile of ood_gap_to_dense_{k} over resamples of the shifted rows"
            )
        columns[f"ood_gap_to_dense_{k}_error"] = Column(
            meaning=f"standard deviation of ood_gap_to_dense_{k} over resamples of the shifted rows"
        )
        columns[f"ood_drop_{k}"] = Column(
            meaning=f"AUC of probes on the best {latents}, on the usual text - on shifted text; {_NO_DROP}",
            better="lower",
            random_is_worst=False,
            reliable=False,
            short=f"drop {k}" if k == 16 else "",
        )
    columns["ood_drop_dense"] = Column(
        meaning="AUC of the dense probe, on the usual text - on shifted text: the model's own share of the gap"
    )
    columns["ood_gap_to_dense_reconstruction"] = Column(
        meaning="dense-probe AUC on raw activations - on reconstructions, both on shifted text", better="lower"
    )
    columns["ood_drop_reconstruction"] = Column(
        meaning=f"AUC of the dense probe on reconstructions, on the usual text - on shifted text; {_NO_DROP}",
        better="lower",
        random_is_worst=False,
        reliable=False,
    )
    return columns


NEEDS = ("tasks",)
WANTS = ()
COLUMNS = _columns()


def ood(subject: Subject) -> Measurements:
    """Two gaps per k, on the AUC of `probing`: to the dense probe on shifted text, and from usual to shifted text.

    ood_gap_to_dense = AUC_dense,shifted - AUC_sae,shifted (the sense of arXiv 2502.16681, whose oracle is the dense
    probe); ood_drop = AUC_sae,test - AUC_sae,shifted, over the tasks that have shifted text. A drop can shrink because
    the first term falls, so read both. The interval of the gap is a paired bootstrap over the shifted rows: dense and
    sparse probes are scored on the same resamples of each task, drawn class by class. It holds for this SAE; what
    another SAE seed changes comes on top.
    """
    tasks = [task for task in probe_scores(subject) if "shifted" in task.rebuilt]
    if not tasks:
        return {}

    def mean(scores: Sequence[Mapping[str, Mapping[str, np.ndarray]]], part: str) -> float:
        return float(np.mean([found[part]["auc"].mean() for found in scores]))

    dense, rebuilt = [task.dense.scores for task in tasks], [task.rebuilt_scores for task in tasks]
    values: Measurements = {
        "ood_drop_dense": mean(dense, "test") - mean(dense, "shifted"),
        "ood_gap_to_dense_reconstruction": mean(dense, "shifted") - mean(rebuilt, "shifted"),
        "ood_drop_reconstruction": mean(rebuilt, "test") - mean(rebuilt, "shifted"),
    }
    for k in OOD_KS:
        sparse = [task.scores[k] for task in tasks]
        gap = f"ood_gap_to_dense_{k}"
        values[gap] = mean(dense, "shifted") - mean(sparse, "shifted")
        values[f"ood_drop_{k}"] = mean(sparse, "test") - mean(sparse, "shifted")
        for task in tasks:
            parts = task.dense.scores["shifted"], task.scores[k]["shifted"]
            values[f"{gap}@{task.name}"] = float(parts[0]["auc"].mean() - parts[1]["auc"].mean())
        resampled = np.mean(
            [
                task.dense.resampled
                - resampled_auc(task.sparse[k]["shifted"], task.dense.draws.parts["shifted"].labels, task.dense.counts)
                for task in tasks
            ],
            axis=0,
        )
        values[f"{gap}_low"], values[f"{gap}_high"] = map(float, np.percentile(resampled, (2.5, 97.5)))
        values[f"{gap}_error"] = float(resampled.std(ddof=1))
    return values
