"""The model card: what the embedded model is, with its measured numbers in tables that can be read back."""

import re
from dataclasses import dataclass
from pathlib import Path

from cache_spec.errors import UserError
from harvest.embedded import vocabulary as words
from harvest.embedded.corpus import PROBE_TASKS, WINDOW_TOKENS
from harvest.embedded.folder import HOOK_POINT
from harvest.embedded.measure import Measured

CARD = "README.md"
_ROW = re.compile(r"^\| ([^|]+) \| (-?[\d.]+) \| (-?[\d.]+) \|$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the card says about one build."""

    n_parameters: int
    n_trained_parameters: int
    n_layers: int
    d_model: int
    n_steps: int
    n_training_documents: int
    n_test_documents: int
    seed: int
    in_distribution: Measured
    shifted: Measured


def _rows(facts: Facts) -> list[tuple[str, float, float]]:
    a, b = facts.in_distribution, facts.shifted
    rows = [
        ("loss", a.loss, b.loss),
        ("floor", a.floor, b.floor),
        ("loss - floor", a.loss - a.floor, b.loss - b.floor),
        ("standard error of loss - floor", a.loss_error, b.loss_error),
        ("spelling accuracy", a.spelling, b.spelling),
        ("sorting accuracy", a.sorting, b.sorting),
    ]
    rows += [(f"AUC {task.name}", a.probe_auc[task.name], b.probe_auc[task.name]) for task in PROBE_TASKS]
    return rows


def render(facts: Facts) -> str:
    """The card as markdown."""
    table = "\n".join(f"| {name} | {a:.4f} | {b:.4f} |" for name, a, b in _rows(facts))
    options = f"--steps {facts.n_steps} --documents {facts.n_training_documents} --seed {facts.seed}"
    return f"""# The embedded language model

A GPT-NeoX with {facts.n_layers} layers and {facts.d_model} dimensions, trained on the synthetic language of
`harvest/embedded/`: {facts.n_parameters:,} parameters, {facts.n_trained_parameters:,} of them trained (the input
embeddings are fixed N(0, 1) codes), {len(words.VOCABULARY)} words, windows of {WINDOW_TOKENS} tokens. It exists so that
sparse autoencoders can be trained and judged offline, against labels that are known for every token. It knows
nothing of any human language.

Made by `python -m harvest.embedded.build {options}` on
{facts.n_training_documents:,} documents, half of them in distribution and half shifted.

## Measured

On {facts.n_test_documents:,} fresh documents of each distribution, in nats per token over all 63 predictions of a
document. The floor is the loss of the ideal predictor that knows the language but not which of the two distributions
a document is from (exact for each document, a Monte-Carlo mean over the same documents); over the even mixture no
model has a lower expected loss. AUCs are of class-balanced logistic probes at `{HOOK_POINT}`, one for each value,
averaged over values, fitted in distribution on other documents.

| number | in distribution | shifted |
| --- | --- | --- |
{table}

Two builds on one machine with the same number of threads are identical; on another machine the loss differs by less
than 0.02.
"""


def numbers(folder: Path) -> dict[str, tuple[float, float]]:
    """The card's table: name -> (in distribution, shifted). Raises UserError if there is no card with numbers."""
    path = folder / CARD
    found = _ROW.findall(path.read_text()) if path.is_file() else []
    if not found:
        raise UserError(f"{path} is not a model card with numbers; make one with `python -m harvest.embedded.build`")
    return {name: (float(a), float(b)) for name, a, b in found}
