"""Masking: which input tokens are replaced before the model runs, and by what.

Every draw is keyed by (seed, variant, window), so neither the batch size, nor the process, nor the order in which
windows run can change it.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from cache_spec.errors import UserError
from cache_spec.plan import VariantPlan
from cache_spec.seeds import derive_seed


def draw_mask(seed: int, variant_name: str, window: int, special: np.ndarray, p: float) -> np.ndarray:
    """special [window_tokens] bool -> which tokens are replaced [window_tokens] bool: each non-special one with
    probability p, independently; a special token (BOS, EOS, padding) never."""
    generator = _generator("harvest/mask", seed, variant_name, window)
    return (generator.random(len(special)) < p) & ~special


def corrupt(
    variant: VariantPlan, seed: int, windows: np.ndarray, tokens: np.ndarray, special: np.ndarray, ordinary: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The input tokens of one variant and which of them were replaced, both [n, window_tokens].

    `windows` [n] are the windows' numbers in the plan, `tokens` and `special` [n, window_tokens] their clean tokens
    and which of these are special. `ordinary` are the ids that a "random" variant draws from, evenly.
    """
    changed, mask = tokens.copy(), np.zeros(tokens.shape, bool)
    if variant.kind == "clean":
        return changed, mask
    for i, window in enumerate(windows):
        mask[i] = draw_mask(seed, variant.name, int(window), special[i], variant.mask_prob)
        if variant.kind == "random":
            generator = _generator("harvest/random_token", seed, variant.name, int(window))
            changed[i, mask[i]] = generator.choice(ordinary, size=len(mask[i]))[mask[i]]
    if variant.kind == "mask":
        changed[mask] = variant.mask_token
    return changed, mask


def window_inputs(
    tokenizer: Tokenizer, variants: Sequence[VariantPlan], seed: int, windows: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the model reads in each variant and which tokens were replaced, both [n_variants, n, window_tokens].

    `windows` [n] are the windows' numbers in the plan and `tokens` [n, window_tokens] their clean tokens.
    """
    special = special_tokens(tokenizer, tokens)
    is_random = any(variant.kind == "random" for variant in variants)
    ordinary = ordinary_tokens(tokenizer) if is_random else np.empty(0, tokens.dtype)
    pairs = [corrupt(variant, seed, windows, tokens, special, ordinary) for variant in variants]
    return np.stack([inputs for inputs, _ in pairs]), np.stack([mask for _, mask in pairs])


def special_tokens(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Which tokens are special (BOS, EOS, padding, unknown): bool of the same shape."""
    return np.isin(tokens, tokenizer.all_special_ids)


def ordinary_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the vocabulary that are not special, in rising order."""
    return np.setdiff1d(np.asarray(sorted(tokenizer.get_vocab().values())), tokenizer.all_special_ids)


def mask_token(tokenizer: Tokenizer, mask_string: str) -> int:
    """The id of the mask string. Raises UserError, naming similar strings that work, unless it is exactly one token."""
    ids = _encode(tokenizer, mask_string)
    if len(ids) == 1 and _known(tokenizer, ids, mask_string):
        return ids[0]
    found = "is not in its vocabulary" if not _known(tokenizer, ids, mask_string) else f"is {len(ids)} tokens"
    nearby = [text for text in _similar(tokenizer, mask_string) if _is_one_token(tokenizer, text)]
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
