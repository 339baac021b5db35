"""Windows: documents cut into equal pieces of tokens, the unit that the model runs on.

The documents of each split are joined with EOS between them (if the tokenizer has one) and cut; each window opens
with BOS (if the tokenizer has one). No document is in both splits. The windows of a split are permuted here, once,
so that no reader has to mix a corpus that comes in order (measured: a batch of unpermuted windows varies as if it
were 15 times smaller).
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.lib.format import write_array
from transformers import PreTrainedTokenizerBase as Tokenizer

from cache_spec.errors import CacheDamaged
from cache_spec.files import Partial, disk_full_as_error, sync_folder
from cache_spec.plan import Plan
from cache_spec.progress import Progress
from cache_spec.seeds import derive_seed

TOKENS_FILE, DOCS_FILE = "_granary/windows.npy", "_granary/window_docs.npy"
_DOCUMENTS_AT_ONCE = 256  # tokenised in one call


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token ids and, for each, the number of its document, both [n_windows, window_tokens] uint32; train first."""

    tokens: np.ndarray
    docs: np.ndarray
    n_documents: int


class TextTooShort(Exception):
    """The documents ran out; carries what they gave. The planner says what to do."""

    def __init__(self, n_train: int, n_held_out: int, n_documents: int) -> None:
        super().__init__(f"{n_documents} documents gave {n_train} train windows and {n_held_out} held-out windows")
        self.n_windows, self.n_documents = n_train + n_held_out, n_documents


def cut_windows(
    documents: Iterable[str], tokenizer: Tokenizer, *, window_tokens: int, n_train: int, n_held_out: int, seed: int
) -> Windows:
    """Read as many documents as it takes to fill `n_train` + `n_held_out` windows.

    Needs 8 bytes of memory a token, and the documents that are tokenised at once: a token is written once, to its
    place in the permuted windows. Raises TextTooShort if there are too few documents.
    """
    bos = tokenizer.bos_token_id
    first = int(bos is not None)
    tokens, docs = (np.empty((n_train + n_held_out, window_tokens), np.uint32) for _ in range(2))
    splits = {"train": slice(0, n_train), "held_out": slice(n_train, None)}
    train, held_out = (
        _Pile(tokens[rows, first:], docs[rows, first:], _places(len(tokens[rows]), seed, name))
        for name, rows in splits.items()
    )
    n_documents = 0
    chooser = _HeldOutChooser(n_held_out / (n_train + n_held_out), seed)
    with Progress("read text", train.n_wanted + held_out.n_wanted, "tokens") as progress:
        for ids in _token_ids(documents, tokenizer):
            pile = held_out if chooser.holds_out(len(ids)) else train
            progress.advance(pile.add(ids, n_documents))
            n_documents += 1
            if train.is_full and held_out.is_full:
                break
    if not (train.is_full and held_out.is_full):
        n_cut = window_tokens - first
        raise TextTooShort(train.n_tokens // n_cut, held_out.n_tokens // n_cut, n_documents)
    if bos is not None:  # a window's BOS counts to the document that it opens with
        tokens[:, 0] = bos
        docs[:, 0] = docs[:, 1]
    return Windows(tokens=tokens, docs=docs, n_documents=n_documents)


def file_sha256(array: np.ndarray) -> str:
    """The SHA-256 of the .npy file that `save_windows` makes of the array."""
    digest = hashlib.sha256()
    write_array(SimpleNamespace(write=digest.update), array)  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


def save_windows(cache: Path, windows: Windows) -> None:
    """Write the tokens beside the plan, so that a shard needs the plan, the model and no text."""
    for name, array in ((TOKENS_FILE, windows.tokens), (DOCS_FILE, windows.docs)):
        path = cache / name
        with disk_full_as_error(path, array.nbytes), Partial(path) as partial:
            write_array(partial, array)  # pyright: ignore[reportArgumentType]
            partial.sync()
            partial.replace()
            sync_folder(path.parent)


def open_windows(cache: Path, plan: Plan) -> Windows:
    """The windows of a plan, mapped from the disk. Raises CacheDamaged if they are not those that were planned."""
    arrays = []
    for name, key in ((TOKENS_FILE, "windows_sha256"), (DOCS_FILE, "window_docs_sha256")):
        path = cache / name
        if not path.is_file():
            raise CacheDamaged(f"{path} is missing, so no more shards can be made; start again in another folder")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != plan.source.get(key):
            raise CacheDamaged(f"{path} was changed after it was written; start again in another folder")
        arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
    return Windows(tokens=arrays[0], docs=arrays[1], n_documents=plan.source["n_documents"])


class _Pile:
    """The windows of one split, filled with its documents, joined, until they are full.

    `tokens` and `docs` [n_windows, n_cut] are written to, the i-th window of the joined documents to row `places[i]`.
    """

    def __init__(self, tokens: np.ndarray, docs: np.ndarray, places: np.ndarray) -> None:
        self._tokens, self._docs, self._places = tokens, docs, places
        self.n_wanted, self._n_cut = tokens.size, tokens.shape[1]
        self.n_tokens = 0  # of the documents taken, the end of the last one too, for which there may be no room

    @property
    def is_full(self) -> bool:
        return self.n_tokens >= self.n_wanted

    def add(self, ids: np.ndarray, number: int) -> int:
        """Take the document if there is room; says how many tokens were still wanted of it."""
        if self.is_full:
            return 0
        n_used, n_written = min(len(ids), self.n_wanted - self.n_tokens), 0
        while n_written < n_used:
            window, start = divmod(self.n_tokens + n_written, self._n_cut)
            end = min(self._n_cut, start + n_used - n_written)
            place = self._places[window]
            self._tokens[place, start:end] = ids[n_written : n_written + end - start]
            self._docs[place, start:end] = number
            n_written += end - start
        self.n_tokens += len(ids)
        return n_used


class _HeldOutChooser:
    """Decides document by document, at random, but never lets the held-out share drift by more than a document.

    A plain coin flip leaves a short text with no held-out document; every n-th document could meet a period in
    the text.
    """

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._owed = share, 0.0
        self._generator = np.random.Generator(np.random.Philox(key=derive_seed("harvest/held_out", seed)))

    def holds_out(self, n_tokens: int) -> bool:
        self._owed += self._share * n_tokens
        held_out = self._owed > self._generator.random() * n_tokens
        if held_out:
            self._owed -= n_tokens
        return held_out


def _token_ids(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each document that has any, with EOS at the end."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if ids:
                yield np.asarray([*ids, *eos], np.uint32)


def _places(n_windows: int, seed: int, split: str) -> np.ndarray:
    """Where each window of a split goes: the row of the i-th one."""
    generator = np.random.Generator(np.random.Philox(key=derive_seed("harvest/windows", seed, split)))
    order = generator.permutation(n_windows)
    places = np.empty_like(order)
    places[order] = np.arange(n_windows)
    return places
