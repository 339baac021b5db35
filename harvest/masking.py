"""Masking: which input tokens are replaced before the model runs, and by what.

Every draw is keyed by (seed, variant, window), so neither the batch size, nor the process, nor the order in which
windows run can change it.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from cache_spec.errors import UserError
from cache_spec.plan import VariantPlan
from cache_spec.seeds import derive_seed
from harvest.words import word_starts

_WORDS_TRIED = 2000  # the common ones have low ids


def draw_mask(seed: int, variant_name: str, window: int, special: np.ndarray, p: float) -> np.ndarray:
    """special [window_tokens] bool -> which tokens are replaced [window_tokens] bool: each non-special one with
    probability p, independently; a special token (BOS, EOS, padding) never."""
    generator = _generator("harvest/mask", seed, variant_name, window)
    return (generator.random(len(special)) < p) & ~special


def draw_word_mask(
    seed: int, variant_name: str, window: int, special: np.ndarray, starts: np.ndarray, p: float
) -> np.ndarray:
    """special, starts [window_tokens] bool -> as `draw_mask`, but whole words are replaced, each with probability p,
    independently; `starts` are the tokens that start one."""
    generator = _generator("harvest/mask_word", seed, variant_name, window)
    draws = generator.random(len(special))  # there are no more words than tokens
    return (draws[np.cumsum(starts) - 1] < p) & ~special


def window_inputs(
    tokenizer: Tokenizer, variants: Sequence[VariantPlan], seed: int, windows: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the model reads in each variant and which tokens were replaced, both [n_variants, n, window_tokens].

    `windows` [n] are the windows' numbers in the plan and `tokens` [n, window_tokens] their clean tokens.
    """
    special = special_tokens(tokenizer, tokens)
    inputs = np.repeat(tokens[None], len(variants), axis=0)
    masks = np.zeros(inputs.shape, bool)
    for variant, changed, mask in zip(variants, inputs, masks, strict=True):
        name, p = variant.name, variant.mask_prob
        match variant.kind:
            case "clean":
                pass
            case "mask":
                mask[:] = [draw_mask(seed, name, int(w), s, p) for w, s in zip(windows, special, strict=True)]
                changed[mask] = variant.mask_token
            case "mask_word":
                starts = word_starts(tokenizer, tokens, special)
                rows = zip(windows, special, starts, strict=True)
                mask[:] = [draw_word_mask(seed, name, int(w), s, start, p) for w, s, start in rows]
                changed[mask] = variant.mask_token
            case "random":
                mask[:] = [draw_mask(seed, name, int(w), s, p) for w, s in zip(windows, special, strict=True)]
                changed[mask] = _random_tokens(seed, name, windows, mask, ordinary_tokens(tokenizer))
            case _:
                raise AssertionError(f"no variant is of the kind {variant.kind}")
    return inputs, masks


def _random_tokens(
    seed: int, variant_name: str, windows: np.ndarray, mask: np.ndarray, ordinary: np.ndarray
) -> np.ndarray:
    """mask [n, window_tokens] -> an ordinary id, evenly drawn, for each True of it, in order."""
    drawn = np.empty(mask.shape, ordinary.dtype)
    for row, window in zip(drawn, windows, strict=True):
        generator = _generator("harvest/random_token", seed, variant_name, int(window))
        row[:] = generator.choice(ordinary, size=len(row))
    return drawn[mask]


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of special tokens, in rising order: BOS, EOS, padding, unknown, and what was added as one (such as the
    marks of a chat), which `all_special_ids` does not list."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return tuple(sorted({*tokenizer.all_special_ids, *added}))


def special_tokens(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Which tokens are special: bool of the same shape."""
    return np.isin(tokens, special_ids(tokenizer))


def ordinary_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the vocabulary that are not special, in rising order."""
    return _ordinary(tokenizer, len(tokenizer), special_ids(tokenizer))


@lru_cache(maxsize=4)  # a vocabulary takes longer to list than a batch to mask
def _ordinary(tokenizer: Tokenizer, n_vocab: int, special: tuple[int, ...]) -> np.ndarray:
    ids = np.asarray(sorted(tokenizer.get_vocab().values()))
    assert len(ids) <= n_vocab
    return np.setdiff1d(ids, special)


def check_vocabulary(tokenizer: Tokenizer, name: str, n_vocab: int, variants: Sequence[VariantPlan]) -> None:
    """Raises UserError if a variant would give the model an id beyond the `n_vocab` that it knows."""
    random = any(variant.kind == "random" for variant in variants)
    largest = int(ordinary_tokens(tokenizer)[-1]) if random else -1
    masks = {variant.mask_string: variant.mask_token for variant in variants if variant.mask_token >= n_vocab}
    for text, token in masks.items():
        raise UserError(
            f"--mask-string {text!r} has the id {token}, and {name} knows ids below {n_vocab}; take another string"
        )
    if largest >= n_vocab:
        raise UserError(
            f"--random-prob draws from a vocabulary with the id {largest}, and {name} knows ids below {n_vocab}; leave "
            "it out for this model"
        )


def mask_token(tokenizer: Tokenizer, mask_string: str) -> int:
    """The id of the mask string. Raises UserError, naming similar strings that work, unless it is exactly one token."""
    ids = _encode(tokenizer, mask_string)
    if len(ids) == 1 and _known(tokenizer, ids, mask_string):
        return ids[0]
    found = "is not in its vocabulary" if not _known(tokenizer, ids, mask_string) else f"is {len(ids)} tokens"
    nearby = [text for text in _similar(tokenizer, mask_string) if _is_one_token(tokenizer, text)]
    nearby = nearby or _some_words(tokenizer)
    works = f"these are one: {', '.join(map(repr, nearby))}" if nearby else "take any word that is one token"
    raise UserError(
        f"--mask-string {mask_string!r} must be one token for the model's tokenizer, and it {found}; {works}"
    )


def _generator(purpose: str, seed: int, variant_name: str, window: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=derive_seed(purpose, seed, variant_name, window)))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _known(tokenizer: Tokenizer, ids: list[int], text: str) -> bool:
    unknown = tokenizer.unk_token_id  # for GPT-2 that is a special token with a use of its own
    return unknown is None or unknown not in ids or text == tokenizer.unk_token


def _is_one_token(tokenizer: Tokenizer, text: str) -> bool:
    ids = _encode(tokenizer, text)
    return len(ids) == 1 and _known(tokenizer, ids, text)


def _similar(tokenizer: Tokenizer, text: str) -> list[str]:
    """Strings a person might mean instead, without repeats, the closest first."""
    bare = text.strip()
    parts = [bare[:n] for n in range(len(bare), 0, -1)]
    special = [t for t in (tokenizer.pad_token, tokenizer.eos_token) if isinstance(t, str)]
    candidates = [f" {bare}", *parts, "...", " ...", "…", "..", ".", "_", *special]
    return [candidate for candidate in dict.fromkeys(candidates) if candidate.strip() and candidate != text][:12]


def _some_words(tokenizer: Tokenizer) -> list[str]:
    """A few words of the vocabulary that are one token."""
    ids = ordinary_tokens(tokenizer)[:_WORDS_TRIED]
    words = tokenizer.batch_decode([[i] for i in ids.tolist()])
    return list(itertools.islice((w for w in words if w.strip().isalnum() and _is_one_token(tokenizer, w)), 5))
