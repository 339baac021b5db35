"""Activations of labelled texts: one row a text, read at its last token, as sae-probes does."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.seeds import derive_seed
from evaluate.kept import code_hash
from evaluate.labelled_text import TextTask
from evaluate.probes import one_hot
from evaluate.rows import Rows
from evaluate.store import Store
from evaluate.tasks import LabelledRows, ProbeData, balanced_draw
from harvest.model import LoadedModel, open_reader

MAX_TEXTS = 8192  # of one part of a task
MAX_TOKENS = 1024  # of a text, the last ones, as in sae-probes
BATCH_TOKENS = 8192


def make_text_tasks(
    loaded: LoadedModel, hook_point: HookPoint, text_tasks: Sequence[TextTask], *, store: Store, seed: int
) -> tuple[ProbeData, ...]:
    """Run the model over the texts of every task, at most MAX_TEXTS of a part: `seed` draws them, evenly by class."""
    return tuple(_probe_data(loaded, hook_point, _thinned(task, seed), store) for task in text_tasks)


def _thinned(task: TextTask, seed: int) -> TextTask:
    texts, labels = dict(task.texts), dict(task.labels)
    for part, values in task.labels.items():
        if len(values) > MAX_TEXTS:
            generator = np.random.default_rng(derive_seed("evaluate/texts", seed, task.name, part))
            kept = balanced_draw(one_hot(values, np.arange(len(task.classes))), MAX_TEXTS, generator)
            texts[part], labels[part] = [task.texts[part][i] for i in kept], values[kept]
    return replace(task, texts=texts, labels=labels)


def _probe_data(loaded: LoadedModel, hook_point: HookPoint, task: TextTask, store: Store) -> ProbeData:
    texts = [text for part in task.texts.values() for text in part]
    source = Rows(x=last_token_rows(loaded, hook_point, texts, store=store, purpose="labelled"))
    two = len(task.classes) == 2
    asked = np.arange(len(task.classes))[1 if two else 0 :]  # two classes are one question, and the second asks it
    parts, start = {}, 0
    for part, labels in task.labels.items():
        rows = np.arange(start, start + len(labels))
        parts[part] = LabelledRows(source=source, rows=rows, labels=one_hot(labels, asked))
        start += len(labels)
    return ProbeData(
        name=task.name,
        classes=tuple(task.classes[i] for i in asked),
        fit=parts["train"],
        test=parts["test"],
        shifted=parts.get("ood"),
        origin=task.origin,
    )


def last_token_rows(
    loaded: LoadedModel, hook_point: HookPoint, texts: Sequence[str], *, store: Store, purpose: str
) -> Tensor:
    """The activation at the last token of each text that is not special: [n, d_model] float32, in the order given.

    A text opens with BOS if the tokenizer has one, as harvested windows do; of a long one the last tokens are read.
    The model runs once over the same texts; what it gave is kept in the store.
    """
    facts = {
        "revision": loaded.revision,
        "hook_point": str(hook_point),
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "threads": torch.get_num_threads(),  # sums are rounded by their number
        "code": code_hash(("harvest",)),
        "texts": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
    }
    made = store.get(purpose, facts, lambda: {"x": _last_rows(loaded, hook_point, texts)})
    return made["x"].to(loaded.device)


def _last_rows(loaded: LoadedModel, hook_point: HookPoint, texts: Sequence[str]) -> Tensor:
    ids = _token_ids(loaded, texts)
    x = torch.empty(len(texts), loaded.d_model)
    with open_reader(loaded, [hook_point]) as reader:
        for chosen in _batches(ids):
            lengths = torch.tensor([len(ids[i]) for i in chosen])
            tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in chosen], batch_first=True)
            read = reader.read(tokens)[hook_point]  # what pads at the end changes nothing before it
            x[chosen] = read[torch.arange(len(chosen)), lengths.to(read.device) - 1].float().cpu()
    return x


def _token_ids(loaded: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text up to its last one that is not special, with BOS before them."""
    bos = loaded.tokenizer.bos_token_id
    first = [] if bos is None else [bos]
    most = min(MAX_TOKENS, loaded.max_tokens or MAX_TOKENS) - len(first)
    special = set(loaded.special_ids)
    found = []
    for text in texts:
        ids: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        while ids and ids[-1] in special:
            ids.pop()
        if not ids:
            raise UserError(f"the text {text[:40]!r} is no token to {loaded.name} that could be read; leave it out")
        found.append([*first, *ids[-most:]])
    return found


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of texts of about one length, at most BATCH_TOKENS a batch."""
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[i]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
