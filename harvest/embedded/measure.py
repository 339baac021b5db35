"""What the embedded model can do: loss against the floor, tasks, and how well parents can be read from it."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from transformers import GPTNeoXForCausalLM

from cache_spec.hook_point import HookPoint
from cache_spec.seeds import derive_seed
from harvest.embedded.corpus import PROBE_TASKS, VALUE_NAMES, Corpus, ProbeTask, label
from harvest.embedded.entropy import ideal_losses
from harvest.embedded.folder import HOOK_POINT
from harvest.embedded.grammar import Draft, write_document
from harvest.embedded.training import token_losses

BATCH_DOCUMENTS = 128
MAX_PROBE_TOKENS = 12_000  # for fitting; a logistic probe on 96 numbers gains nothing from more


@dataclass(frozen=True)
class Measured:
    """Numbers of one distribution. Losses in nats per token, over all 63 predictions of a document."""

    loss: float
    loss_error: float  # standard error over documents of loss - floor
    floor: float
    spelling: float  # share of right answers, chosen among all words
    sorting: float
    probe_auc: dict[str, float]  # task name -> mean over values of the one-vs-rest AUC


def held_out(n_documents: int, purpose: str, seed: int, shifted: bool) -> list[Draft]:
    """Fresh documents for one purpose; no other purpose has the same."""
    stream = derive_seed("embedded/held out", purpose, seed)
    return [write_document(stream, shifted, number) for number in range(n_documents)]


@torch.no_grad()
def losses(model: GPTNeoXForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """[n_documents, 64] -> nats of every token after the first, [n_documents, 63]."""
    batches = torch.from_numpy(tokens).split(BATCH_DOCUMENTS)
    return torch.cat([token_losses(model, batch) for batch in batches]).numpy()


@torch.no_grad()
def activations(model: GPTNeoXForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Residual stream at `HOOK_POINT`: [n_documents, 64] -> [n_documents, 64, d_model]."""
    layer = HookPoint.parse(HOOK_POINT).layer
    found: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append(output)

    handle = model.gpt_neox.layers[layer].register_forward_hook(keep)
    try:
        for batch in torch.from_numpy(tokens).split(BATCH_DOCUMENTS):
            model.gpt_neox(input_ids=batch)
    finally:
        handle.remove()
    return torch.cat(found).numpy()


@torch.no_grad()
def accuracy(model: GPTNeoXForCausalLM, corpus: Corpus, positions: str) -> float:
    """Share of the tokens at `positions` that the model would have said itself."""
    right: list[np.ndarray] = []
    where = corpus.positions[positions][:, 1:]
    for start in range(0, len(where), BATCH_DOCUMENTS):
        tokens = torch.from_numpy(corpus.tokens[start : start + BATCH_DOCUMENTS])
        said = model(input_ids=tokens).logits[:, :-1].argmax(-1)
        right.append((said == tokens[:, 1:]).numpy()[where[start : start + BATCH_DOCUMENTS]])
    return float(np.concatenate(right).mean())


def _read(task: ProbeTask, corpus: Corpus, activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    where = corpus.positions[task.positions] & (corpus.attributes[task.attribute] >= 0)
    return activations[where], corpus.attributes[task.attribute][where]


def probe_aucs(
    task: ProbeTask, fitted_on: tuple[Corpus, np.ndarray], tested_on: list[tuple[Corpus, np.ndarray]]
) -> list[float]:
    """Mean over the attribute's values of the AUC of a class-balanced logistic probe, for each test corpus."""
    x, y = _read(task, *fitted_on)
    x, y = x[:MAX_PROBE_TOKENS], y[:MAX_PROBE_TOKENS]
    scaler = StandardScaler().fit(x)
    scores: list[list[float]] = [[] for _ in tested_on]
    for value in range(len(VALUE_NAMES[task.attribute])):
        probe = LogisticRegression(C=0.01, class_weight="balanced", max_iter=300).fit(scaler.transform(x), y == value)
        for found, (corpus, activations) in zip(scores, tested_on, strict=True):
            x_test, y_test = _read(task, corpus, activations)
            found.append(float(roc_auc_score(y_test == value, probe.decision_function(scaler.transform(x_test)))))
    return [float(np.mean(found)) for found in scores]


def measure(model: GPTNeoXForCausalLM, n_documents: int, seed: int) -> tuple[Measured, Measured]:
    """(in distribution, shifted). Probes are fitted in distribution, on documents of their own."""
    drafts = [held_out(n_documents, "test", seed, shifted) for shifted in (False, True)]
    tests = [label(each) for each in drafts]
    fit = label(held_out(n_documents, "probe", seed, False))
    fitted_on = (fit, activations(model, fit.tokens))
    tested_on = [(corpus, activations(model, corpus.tokens)) for corpus in tests]
    aucs = {task.name: probe_aucs(task, fitted_on, tested_on) for task in PROBE_TASKS}
    results: list[Measured] = []
    for which, (written, corpus) in enumerate(zip(drafts, tests, strict=True)):
        loss, floor = losses(model, corpus.tokens), ideal_losses(written)
        results.append(
            Measured(
                loss=float(loss.mean()),
                loss_error=float((loss - floor).mean(axis=1).std() / np.sqrt(len(loss))),
                floor=float(floor.mean()),
                spelling=accuracy(model, corpus, "spelling_answer"),
                sorting=accuracy(model, corpus, "sorting_answer"),
                probe_auc={name: both[which] for name, both in aucs.items()},
            )
        )
    return results[0], results[1]
