"""first_letter: absorption of the first-letter task of Chanin et al., on any model whose vocabulary has words."""

import numpy as np
import torch

from evaluate.columns import Column
from evaluate.names import Measurements
from evaluate.projection import Absorbed, absorbed
from evaluate.rows import Rows
from evaluate.spelling import Spelling
from evaluate.split_latents import split_latents
from evaluate.subject import Dictionary, Subject

NEEDS = ("spelling",)
WANTS = ()
MIN_PARAMETERS = 1_000_000_000
MIN_LATENTS = 16_000
MIN_FOUND_F1 = 0.3  # a letter whose latents are never wrong falls below it when over 82 % of its words are absorbed
_SIZE = "means little for a model below 1B parameters or an SAE below 16k latents, see first_letter_is_meaningful"
_SCORE = "first_letter_mean_full_absorption_score"

COLUMNS = {
    _SCORE: Column(
        meaning=(
            "first letters: the letter's latents are all off and one aligned latent carries at least 40 % of it; mean "
            f"over letters. An SAE that learnt too little to absorb scores well, and it {_SIZE}"
        ),
        better="lower",
        claim=True,
        random_is_worst=False,
        reliable=False,
        short="abs letter",
        terminal=True,
    ),
    "first_letter_mean_absorption_fraction_score": Column(
        meaning=(
            "first letters: share of the letter's direction carried by up to three other latents, mean over letters. "
            f"An SAE that learnt too little to absorb scores well, and it {_SIZE}"
        ),
        better="lower",
        random_is_worst=False,
        reliable=False,
    ),
    "first_letter_found_full_absorption_score": Column(
        meaning=(
            "full absorption of first letters, mean over those whose latents have train F1 of at least 0.3; absent "
            "where there are none. A lower F1 says that the SAE has no latent for the letter, absorbed or not"
        ),
        better="lower",
        random_is_worst=False,
        reliable=False,
    ),
    "first_letter_num_found_letters": Column(
        meaning="letters whose latents have train F1 of at least 0.3", better="higher"
    ),
    "first_letter_k1_f1": Column(
        meaning="F1 on test words of a probe on a letter's first latent: how well one latent stands for it",
        better="higher",
        short="k1 letter",
    ),
    "first_letter_mean_num_split_features": Column(meaning="latents that stand for one letter, mean over letters"),
    "first_letter_num_letters": Column(meaning="letters with a usable dense probe, of 26; a fact of the model"),
    "first_letter_mean_probe_f1": Column(meaning="F1 of their dense probes on test words; a fact of the model"),
    "first_letter_is_meaningful": Column(
        meaning="1 where model and SAE are large enough for first-letter absorption to mean anything, else 0"
    ),
}


def first_letter(subject: Subject) -> Measurements:
    """Absorption on the first-letter task (arXiv 2409.14507, as in SAEBench 0.6; docs/first-letter.md says where not).

    For every letter with a usable dense probe: its latents are `split_latents`; on test words with the letter whose
    dense probe says so, `projection.absorbed`. Rates are means over words, then over letters; `@a` is one letter's.
    """
    spelling = subject.bench.spelling
    assert spelling is not None
    split = split_latents(subject.dictionary, spelling)
    per_letter = _per_letter(subject.dictionary, spelling, split.latents)
    full = np.array([letter.full.mean() for letter in per_letter])
    fraction = np.array([letter.fraction.mean() for letter in per_letter])
    found = split.train_f1 >= MIN_FOUND_F1
    values: Measurements = {
        _SCORE: float(full.mean()),
        "first_letter_mean_absorption_fraction_score": float(fraction.mean()),
        "first_letter_num_found_letters": float(found.sum()),
        "first_letter_k1_f1": float(split.k1_f1.mean()),
        "first_letter_mean_num_split_features": float(np.mean([len(latents) for latents in split.latents])),
        "first_letter_num_letters": float(len(spelling.letters)),
        "first_letter_mean_probe_f1": float(spelling.probe_f1.mean()),
        "first_letter_is_meaningful": float(
            not guard(subject.bench.model.n_parameters, len(subject.dictionary.directions))
        ),
    }
    if found.any():
        values["first_letter_found_full_absorption_score"] = float(full[found].mean())
    for i, letter in enumerate(spelling.letters):
        name = chr(ord("a") + letter)
        values[f"{_SCORE}@{name}"] = float(full[i])
        values[f"first_letter_k1_f1@{name}"] = float(split.k1_f1[i])
    return values


def guard(n_parameters: int, d_sae: int) -> str:
    """What upstream warns of, in a sentence to print beside the score; empty where model and SAE are large enough.

    SAEBench says that the score is sensible for models of at least 1B parameters and SAEs of at least 16k latents (its
    own runs take 2B). `n_parameters` 0: not known.
    """
    if n_parameters >= MIN_PARAMETERS and d_sae >= MIN_LATENTS:
        return ""
    size = f"{n_parameters / 1e9:.2g}B parameters" if n_parameters else "an unknown number of parameters"
    return (
        f"first-letter absorption means little here: the model has {size} and the SAE {d_sae:,} latents, and upstream "
        "asks for at least 1B and 16,000"
    )


def _per_letter(dictionary: Dictionary, spelling: Spelling, split: list[np.ndarray]) -> list[Absorbed]:
    """What happened on the test words of each letter whose dense probe is right."""
    x = spelling.test.rows.x
    along = dictionary.directions @ spelling.directions.T  # [d_sae, n_letters]
    cosine = along / dictionary.directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    found = []
    for i, numbers in enumerate(split):
        words = x[torch.from_numpy(np.flatnonzero(spelling.right[i])).to(x.device)]
        own = torch.zeros(len(along), dtype=torch.bool, device=x.device)
        own[torch.from_numpy(numbers).to(x.device)] = True
        total = (words - dictionary.offset) @ spelling.directions[i]
        found.append(absorbed(dictionary.encode(Rows(x=words)), own, along[:, i], cosine[:, i], total))
    return found
