"""How often things happen in the embedded language, and the probabilities that follow."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from cache_spec.seeds import derive_seed
from harvest.embedded import vocabulary as words

DOCUMENT_TOKENS = 63  # with the beginning-of-text token: a window of 64


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How often things happen. The defaults are the shipped language."""

    pause: float = 0.015
    meet: tuple[float, ...] = (0.45, 0.3, 0.2)  # chance to meet the hero now, at the first sentence boundaries
    noun_zipf: float = 1.0
    hero_zipf: float = 0.5
    topic_kind: float = 0.85  # in distribution: share of nouns forced to the topic's kind, the rest even
    alliteration: float = 0.85  # in distribution: share of adjectives forced to the noun's letter, the rest even
    article: float = 0.6
    adjective: float = 0.45
    own_verb: float = 0.8
    scene: float = 0.2  # share of noun sentences that end with a scene word
    own_scene: float = 0.8  # of those: drawn from the topic's own words, the rest from all
    slot_hero_act: float = 0.85  # at the slot, hero known: one of the hero's acts
    slot_hero_scene: float = 0.03  # at the slot, hero known: one of the topic's scenes; the rest from all words
    slot_scene: float = 0.3  # at the slot, no hero: one of the topic's scenes; the rest from all words
    sentence: tuple[float, ...] = (0.40, 0.38, 0.06, 0.06, 0.10)  # noun, slot, spelling, sorting, repetition


RATES = Rates()


class Weighted:
    """Shares that sum to one, with their running sums to draw from."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = list(shares)
        self._running = list(accumulate(self.shares))

    def draw(self, uniform: float) -> int:
        """The index that a number in [0, 1) falls on."""
        return min(bisect_right(self._running, uniform * self._running[-1]), len(self.shares) - 1)


@dataclass(frozen=True)
class Tables:
    """Probabilities worked out once. The first index is 0 in distribution, 1 shifted."""

    sentence: tuple[Weighted, Weighted]  # [whether a noun has been said][sentence]
    kind: list[list[Weighted]]  # [2][topic][kind]
    nouns_of_kind: list[list[int]]  # [kind][rank]
    rank: Weighted  # [rank]: the same for every kind
    noun_given_kind: list[float]  # [noun]
    onset: list[list[dict[str, float]]]  # [2][topic][onset]: probability that a noun begins with this onset
    noun: list[list[list[float]]]  # [2][topic][noun]
    heroes_of_topic: list[list[int]]  # [topic][rank]
    hero_rank: Weighted
    slot: list[list[Weighted]]  # [topic][hero, or one past the last for nobody][word of SLOT_WORDS]


SLOT_WORDS = words.ACTS + words.SCENES


def _zipf(n: int, exponent: float) -> list[float]:
    weights = [1.0 / (rank + 1) ** exponent for rank in range(n)]
    return [weight / sum(weights) for weight in weights]


_TWO_TOKEN_LEAD = 0.35  # of a full range of 1: two-token nouns are few, so they are made frequent


def _ranked_nouns(kind: int) -> list[int]:
    """The nouns of a kind, most frequent first. Letters take turns, so that no kind favours a letter."""
    members = [i for i, noun in enumerate(words.NOUNS) if noun.kind == kind]
    order = random.Random(derive_seed("embedded/noun frequency", kind))
    turns: list[list[int]] = []
    for letter in range(len(words.LETTERS)):
        of_letter = [i for i in members if words.NOUNS[i].letter == letter]
        turns.append(sorted(of_letter, key=lambda i: order.random() - _TWO_TOKEN_LEAD * len(words.NOUNS[i].words)))
    ranked: list[int] = []
    for round_of_turns in zip(*turns, strict=True):
        ranked += sorted(round_of_turns, key=lambda _: order.random())
    return ranked


def _slot_row(topic: int, hero: int) -> Weighted:
    """Probabilities of the word after a slot. `hero` one past the last means nobody was named."""
    nobody = hero == len(words.HEROES)
    act_share = 0.0 if nobody else RATES.slot_hero_act
    scene_share = RATES.slot_scene if nobody else RATES.slot_hero_scene
    row = [(1.0 - act_share - scene_share) / len(SLOT_WORDS)] * len(SLOT_WORDS)
    if not nobody:
        for act in words.ACTS_OF_HERO[hero]:
            row[act] += act_share / 2
    for scene in words.SCENES_OF_TOPIC[topic]:
        row[words.N_ACTS + scene] += scene_share / 4
    return Weighted(row)


def _sentence_shares() -> tuple[Weighted, Weighted]:
    """With no noun to repeat yet, the repetition's share goes to noun sentences."""
    noun, slot, spelling, sorting, repetition = (share / sum(RATES.sentence) for share in RATES.sentence)
    return (
        Weighted([noun + repetition, slot, spelling, sorting, 0.0]),
        Weighted([noun, slot, spelling, sorting, repetition]),
    )


@cache
def tables() -> Tables:
    """The probabilities that `RATES` imply."""
    n_topics, n_kinds = len(words.TOPICS), len(words.KINDS)
    forced = (RATES.topic_kind, 0.0)
    kind = [
        [[f * (k == t % n_kinds) + (1 - f) / n_kinds for k in range(n_kinds)] for t in range(n_topics)] for f in forced
    ]
    nouns_of_kind = [_ranked_nouns(k) for k in range(n_kinds)]
    rank = _zipf(len(nouns_of_kind[0]), RATES.noun_zipf)
    given_kind = [0.0] * len(words.NOUNS)
    for ranked in nouns_of_kind:
        for i, probability in zip(ranked, rank, strict=True):
            given_kind[i] = probability
    noun = [[[row[n.kind] * given_kind[i] for i, n in enumerate(words.NOUNS)] for row in rows] for rows in kind]
    onset: list[list[dict[str, float]]] = []
    for rows in noun:
        onset.append([])
        for row in rows:
            sums: dict[str, float] = {}
            for i, probability in enumerate(row):
                first = words.NOUNS[i].words[0]
                sums[first] = sums.get(first, 0.0) + probability
            onset[-1].append(sums)
    heroes = [[h for h, t in enumerate(words.TOPIC_OF_HERO) if t == topic] for topic in range(n_topics)]
    return Tables(
        sentence=_sentence_shares(),
        kind=[[Weighted(row) for row in rows] for rows in kind],
        nouns_of_kind=nouns_of_kind,
        rank=Weighted(rank),
        noun_given_kind=given_kind,
        onset=onset,
        noun=noun,
        heroes_of_topic=heroes,
        hero_rank=Weighted(_zipf(len(heroes[0]), RATES.hero_zipf)),
        slot=[[_slot_row(topic, hero) for hero in range(len(words.HEROES) + 1)] for topic in range(n_topics)],
    )
