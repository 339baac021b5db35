"""First-letter prompts of any model: what Chanin et al.'s absorption protocol reads (arXiv 2409.14507)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cache_spec.hook_point import HookPoint
from cache_spec.seeds import derive_seed
from evaluate.probes import Standard, f1_score, one_hot
from evaluate.rows import Rows
from evaluate.spelling_words import (
    N_LETTERS,
    Words,
    answer_ids,
    even_draw,
    prompts,
    split,
    vocabulary_words,
)
from evaluate.store import Store
from evaluate.windows import Source
from harvest.model import LoadedModel

PENALTY = 1.0
MAX_STEPS = 300
MIN_PROBE_F1 = 0.6  # SAEBench: a letter whose dense probe is worse on test words is left out
MIN_LETTERS = 20  # SAEBench: with fewer there is no score
MIN_RIGHT = 10  # test words that a letter's rate is a mean over
MIN_WORDS = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class SpelledWords:
    """Words with the activation at their own token: rows [n], letters [n] (0 for a)."""

    rows: Rows
    letters: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Spelling:
    """The activations and labels of spelling prompts, shared by all SAEs of one model and hook point.

    letters: [n_letters], those with a usable probe. directions: [n_letters, d_model], the unit directions of their
    dense probes. probe_f1: [n_letters], on test words. right: bool [n_letters, n_test], test words with the letter
    whose dense probe says so.
    """

    train: SpelledWords
    test: SpelledWords
    letters: np.ndarray
    directions: Tensor
    probe_f1: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, train: SpelledWords, test: SpelledWords) -> "Spelling":
        """Fit the probes; keep the letters whose probe has F1 above 0.6 and is right on ten test words or more."""
        probes = fit_probes(train)
        on = one_hot(test.letters, np.arange(N_LETTERS))
        says = (probes[:, :-1] @ test.rows.x.double().T + probes[:, -1:] > 0).cpu().numpy()
        f1 = f1_score(says, on)
        letters = np.flatnonzero((f1 > MIN_PROBE_F1) & ((on & says).sum(1) >= MIN_RIGHT))
        directions = probes[torch.from_numpy(letters).to(probes.device), :-1]
        return cls(
            train=train,
            test=test,
            letters=letters,
            directions=functional.normalize(directions, dim=1).to(test.rows.x.dtype),
            probe_f1=f1[letters],
            right=(on & says)[letters],
        )


def fit_probes(words: SpelledWords) -> Tensor:
    """Dense logistic probes of the 26 letters on the activations as they are: [26, d_model + 1], intercept last.

    Upstream's are one-vs-rest too, by 50 epochs of Adam at 1e-2, whose result depends on how long and how far it went.
    These are the optimum of `probes.fit_logistic` (class-balanced, ridge penalty 1, on standardised activations), all
    letters at once by L-BFGS, for Newton's d_model x d_model systems take minutes here. The probe of a letter without
    words never says yes.
    """
    standard = Standard.of(words.rows.x)
    x = standard.apply(words.rows.x).double()
    on = torch.from_numpy(one_hot(words.letters, np.arange(N_LETTERS))).to(x.device)
    n, n_on = len(x), on.sum(1, keepdim=True)
    sample = torch.where(on, n / (2 * n_on.clamp(min=1)), n / (2 * (n - n_on).clamp(min=1))).double()
    weights = torch.zeros(N_LETTERS, x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    intercept = torch.zeros(N_LETTERS, 1, dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, intercept],
        max_iter=MAX_STEPS,
        history_size=20,
        tolerance_grad=1e-4,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        z = weights @ x.T + intercept
        value = (sample * (functional.softplus(z) - on * z)).sum() + PENALTY / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    scaled = weights.detach() / standard.std.double()
    shifted = intercept.detach() - scaled @ standard.mean.double().unsqueeze(1)
    shifted[n_on == 0] = -torch.inf
    return torch.cat([scaled, shifted], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """Prompts that end with the word they ask for: tokens [n, longest], and last [n], the place of that word.

    A prompt shorter than the longest is filled up with its last token, which nothing before it reads.
    """

    words: Words
    tokens: np.ndarray
    last: np.ndarray


def write_prompts(loaded: LoadedModel, seed: int, n_words: int) -> tuple[tuple[Asked, Asked] | None, str]:
    """Prompts for train and test words; or None and the reason. The examples in all of them are train words."""
    tokenizer = loaded.tokenizer
    known = vocabulary_words(tokenizer, loaded.special_ids, loaded.vocab_size)
    if len(known.words) < MIN_WORDS:
        return None, (
            f"the vocabulary of {loaded.name} has {len(known.words)} tokens that are one word of ASCII letters, and "
            f"the first-letter task needs {MIN_WORDS}"
        )
    answers, reason = answer_ids(tokenizer, known)
    if reason:
        return None, f"the first-letter task cannot be asked of {loaded.name}: {reason}"
    generator = np.random.default_rng(derive_seed("evaluate/spelling", seed))
    train, test = split(even_draw(known, n_words, generator), generator)
    found = []
    for words in (train, test):
        texts = prompts(words, train, answers, tokenizer.bos_token_id, generator)  # pyright: ignore
        longest = max(map(len, texts))
        tokens = np.array([text + text[-1:] * (longest - len(text)) for text in texts], np.int64)
        found.append(Asked(words=words, tokens=tokens, last=np.array([len(text) - 1 for text in texts])))
    longest = max(asked.tokens.shape[1] for asked in found)
    if loaded.max_tokens is not None and longest > loaded.max_tokens:
        return None, f"a first-letter prompt has {longest} tokens, and {loaded.name} reads {loaded.max_tokens} at most"
    return (found[0], found[1]), ""


def make_spelling(
    loaded: LoadedModel, hook_point: HookPoint, *, store: Store, seed: int, n_words: int = 4000
) -> tuple[Spelling | None, str]:
    """Read the model at the words of its own vocabulary; or None and the reason in a sentence.

    The seed decides the words drawn (evenly over the letters), which fifth of each letter is for testing, and the
    examples.
    """
    asked, reason = write_prompts(loaded, seed, n_words)
    if asked is None:
        return None, reason
    source = Source(loaded=loaded, hook_point=hook_point, store=store)
    train, test = asked
    spelling = Spelling.of(_read(source, train, "spelling-train"), _read(source, test, "spelling-test"))
    if len(spelling.letters) < MIN_LETTERS:
        return None, (
            f"at {hook_point} of {loaded.name} {len(spelling.letters)} of 26 letters can be read off a word's "
            f"activation (probe F1 above {MIN_PROBE_F1}, {MIN_RIGHT} right test words), and the first-letter task "
            f"needs {MIN_LETTERS}; it may work at another layer or on a larger model"
        )
    return spelling, ""


def _read(source: Source, asked: Asked, purpose: str) -> SpelledWords:
    is_last = np.arange(asked.tokens.shape[1]) == asked.last[:, None]
    return SpelledWords(rows=Rows(x=source.rows(purpose, asked.tokens, is_last)), letters=asked.words.letters)
