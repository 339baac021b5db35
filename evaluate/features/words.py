"""Token ids as text: what a tokenizer writes for each token where it follows another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_spec import ActivationCache, UserError
from evaluate.cache_model import name_of_model
from harvest.model import load_model

MOST_CHARACTERS = 80  # of one token; some tokenizers have tokens of hundreds of spaces


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """A tokenizer, or None, and then tokens are shown by their numbers and `missing` says why."""

    tokenizer: Any = None
    missing: str = ""

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token, never empty: with the space before it if it has one."""
        numbers = [int(i) for i in ids]
        if self.tokenizer is None or not numbers:
            return [f"⟨{i}⟩" for i in numbers]
        vocabulary = self.tokenizer.get_vocab()
        # Decoded behind plain letters, since many decoders drop the space of a first token.
        anchor = min((i for token, i in vocabulary.items() if token.isascii() and token.isalnum()), default=0)
        texts = _decode(self.tokenizer, [[anchor], *([anchor, i] for i in numbers)])
        n_anchor = len(texts[0])
        return [
            text[n_anchor : n_anchor + MOST_CHARACTERS] or f"⟨{i}⟩" for text, i in zip(texts[1:], numbers, strict=True)
        ]


def words_of(cache: ActivationCache, model: str = "") -> Words:
    """The tokenizer of a cache's text, or of the model named; of a model, no weights are loaded or downloaded."""
    name = model or name_of_model(cache)[0]
    try:
        return Words(tokenizer=load_model(name, weights=False).tokenizer)
    except UserError as error:
        if model:
            raise
        return Words(missing=f"tokens are shown by their numbers, for the tokenizer cannot be had: {error}")


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
