"""probing: what a linear probe on the best few latents can tell."""

from functools import lru_cache

import numpy as np

from evaluate.columns import Column
from evaluate.language import scores_of
from evaluate.latent_choice import by_difference, fit_sparse, to_labels
from evaluate.subject import Subject

KS = (1, 5, 16)


def _columns() -> dict[str, Column]:
    columns = {}
    for score, words in (("auc", "AUC"), ("balanced_accuracy", "balanced accuracy")):
        for k in KS:
            for tail, where in (("", "text like the training text"), ("_shifted", "shifted text")):
                columns[f"sae_top_{k}_test_{score}{tail}"] = Column(
                    meaning=f"{words} of probes on the best {k} latent{'s' * (k > 1)}, on {where}",
                    better="higher",
                    oracle_is_best=True,
                    short=f"AUC{k}{' shifted' if tail else ''}" if score == "auc" and k < 16 else "",
                    terminal=score == "auc" and k == 1 and not tail,  # the shifted one is in the gap to the dense probe
                )
        for tail, where in (("", "text like the training text"), ("_shifted", "shifted text")):
            columns[f"llm_test_{score}{tail}"] = Column(
                meaning=f"{words} of a dense probe on the raw activations, on {where}"
            )
    return columns


NEEDS_LANGUAGE = True
COLUMNS = _columns()


def probing(subject: Subject) -> dict[str, float]:
    """k-sparse probing of every probe task, in the manner of sae-probes: on the same text and on shifted text.

    One-vs-rest per class: the k latents with the largest |standardised mean difference| on the fit text, a
    class-balanced ridge-logistic probe on them fitted there, AUC and balanced accuracy on the two test texts; mean over
    the classes of a task, then over tasks. `llm_test_*` is a dense probe on raw activations (names as in SAEBench).
    """
    language = subject.bench.language
    assert language is not None
    values: dict[str, float] = {}
    if not language.probe_rows:
        return values
    for score in ("auc", "balanced_accuracy"):
        for part, tail in (("test", ""), ("shifted", "_shifted")):
            for k in KS:
                by_task = [scores[part][score].mean() for scores in sparse_scores(subject)[k].values()]
                values[f"sae_top_{k}_test_{score}{tail}"] = float(np.mean(by_task))
            dense = [scores[part][score].mean() for scores in language.dense_scores.values()]
            values[f"llm_test_{score}{tail}"] = float(np.mean(dense))
    return values


@lru_cache(maxsize=1)  # probing and ood ask for the same subject one after the other
def sparse_scores(subject: Subject) -> dict[int, dict[str, dict[str, dict[str, np.ndarray]]]]:
    """k -> task -> "test" | "shifted" -> "auc" | "balanced_accuracy" -> [classes]."""
    language = subject.bench.language
    assert language is not None
    found: dict[int, dict[str, dict[str, dict[str, np.ndarray]]]] = {k: {} for k in KS}
    for task, parts in language.probe_rows.items():
        latents = {
            part: subject.latents(part)[to_labels(rows.rows, subject.latents(part))] for part, rows in parts.items()
        }
        labels = to_labels(parts["fit"].labels, latents["fit"])
        order = by_difference(latents["fit"], labels, max(KS))
        for k in KS:
            probe = fit_sparse(latents["fit"], labels, order[:, :k])
            found[k][task] = {
                part: scores_of(probe.logits(latents[part]), parts[part].labels) for part in ("test", "shifted")
            }
    return found
