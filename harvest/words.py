"""Words: which tokens of a window belong together, for masking that replaces whole words.

A word is what whitespace separates, with the whitespace before it: punctuation belongs to the word that it touches,
and a newline to the word that it opens. Tokens of nothing but whitespace in a row are a word each, but for the last,
which opens what follows. A special token is no word, and the token after it starts one, whatever its text.
"""

from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer


def word_starts(tokenizer: Tokenizer, tokens: np.ndarray, special: np.ndarray) -> np.ndarray:
    """Which tokens start a word: bool of the shape of `tokens` and `special`, [n, window_tokens].

    The first token of a window starts one, since a window is drawn without its neighbours. A special token is said to
    start one too, so that it never shares one.
    """
    starts = _starters(tokenizer, len(tokenizer))[tokens] | special
    starts[..., 1:] |= special[..., :-1]
    starts[..., 0] = True
    return starts


@lru_cache(maxsize=4)
def _starters(tokenizer: Tokenizer, n_vocab: int) -> np.ndarray:  # n_vocab: a tokenizer may be given more tokens
    """For each id up to the largest, whether its text begins with whitespace where it follows other text.

    Told by decoding each token behind one fixed token, for only the decoder knows how a tokenizer marks a space:
    by a character before the word (byte-level, SentencePiece), by one inside it (WordPiece), or not at all.
    """
    vocabulary = tokenizer.get_vocab()
    ids = sorted(vocabulary.values())
    assert len(ids) <= n_vocab
    # plain letters read the same whatever follows them; part of a character might not
    anchor = min((i for token, i in vocabulary.items() if token.isascii() and token.isalnum()), default=ids[-1])
    n_anchor = len(_decode(tokenizer, [[anchor]])[0])
    starters = np.zeros(ids[-1] + 1, bool)
    starters[ids] = [text[n_anchor : n_anchor + 1].isspace() for text in _decode(tokenizer, [[anchor, i] for i in ids])]
    return starters


def _decode(tokenizer: Tokenizer, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
