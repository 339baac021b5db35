"""Which latents to show: `all`, `0-99`, `3,7,20-29`, `top`, `dead` or `random`, the last three with a number."""

import re

import numpy as np

from cache_spec.errors import UserError
from cache_spec.seeds import derive_seed

N_DEFAULT = 100  # of top, dead and random where no number is given
_WORDS = ("top", "dead", "random")
_HELP = "give all, numbers such as 0-99 or 3,7,20-29, or top, dead or random, with how many: top:50"


def check_selection(text: str, d_sae: int) -> None:
    """Raises UserError for a selection that says nothing or names latents that the SAE lacks."""
    select(text, np.zeros(d_sae), seed=0)


def select(text: str, density: np.ndarray, seed: int) -> np.ndarray:
    """The latents [n] that a selection means, each once and in order. density: [d_sae] share of rows each fires on.

    `top` are those that fire most often, `dead` those that never fire on the rows read, `random` are drawn by `seed`.
    """
    d_sae = len(density)
    if text.strip() == "all":
        return np.arange(d_sae)
    word, _, count = text.strip().partition(":")
    if word in _WORDS:
        n = N_DEFAULT if not count else _number(count, text)
        if word == "random":
            generator = np.random.default_rng(derive_seed("evaluate/latents", seed))
            return np.sort(generator.choice(d_sae, min(n, d_sae), replace=False))
        found = np.argsort(-density, kind="stable") if word == "top" else np.flatnonzero(density == 0)
        return np.sort(found[:n])
    chosen: set[int] = set()
    for part in text.split(","):
        first, last = _range(part.strip(), text)
        if last >= d_sae:
            raise UserError(f"--latents {text} names latent {last}, and the SAE has 0 to {d_sae - 1}; {_HELP}")
        chosen.update(range(first, last + 1))
    return np.array(sorted(chosen))


def _range(part: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
    if match is None:
        raise UserError(f"--latents '{text}' has '{part}', which is no latent; {_HELP}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UserError(f"--latents '{text}' has {part}, which ends before it begins; {_HELP}")
    return first, last


def _number(count: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", count) or not int(count):
        raise UserError(f"--latents '{text}' has '{count}', and a number of 1 or more is wanted there; {_HELP}")
    return int(count)
