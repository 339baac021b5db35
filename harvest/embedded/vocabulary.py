"""The words of the embedded language: who belongs to whom, and the number of every token.

Everything here is fixed by the code alone (no random draw depends on a run), so that the shipped weights,
the tokenizer and the labels can never disagree.
"""

import random
from dataclasses import dataclass
from itertools import product

from cache_spec.seeds import derive_seed

BOS, UNKNOWN, PAUSE, PERIOD = "<bos>", "<unk>", "...", "."
ABOUT, MEET, SLOT, SPELL, SORT, AGAIN = "about", "meet", "they", "spell", "sort", "again"

LETTERS = ("b", "d", "f", "k", "l", "m", "s", "t")
KINDS = ("animal", "tool", "plant", "food", "cloth", "place")
TOPICS = ("sea", "market", "forest", "school", "war", "feast")
HEROES_OF_TOPIC = (
    ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry"),
    ("Irene", "Jonas", "Karin", "Louis", "Maria", "Niels", "Olga", "Peter"),
    ("Quinn", "Rosa", "Simon", "Tilda", "Ulric", "Vera", "Walter", "Xenia"),
    ("Yusuf", "Zelda", "Adam", "Bella", "Conrad", "Dora", "Emil", "Flora"),
    ("Gustav", "Hanna", "Igor", "Julia", "Kurt", "Laura", "Martin", "Nora"),
    ("Oscar", "Paula", "Ralf", "Sara", "Tomas", "Ursula", "Victor", "Wanda"),
)
HEROES = tuple(name for names in HEROES_OF_TOPIC for name in names)
TOPIC_OF_HERO = tuple(topic for topic, names in enumerate(HEROES_OF_TOPIC) for _ in names)

ARTICLES = ("an", "tu", "pa", "fo", "co", "pla")  # one for each kind, before the noun
PARTICLES = ("nin", "lun", "ran", "don", "hon", "sen")  # one for each kind, obligatory after the noun phrase

N_ONE_TOKEN_PER_CELL = 3  # one-token nouns for each (kind, letter)
N_ONSETS_PER_LETTER = 3  # each goes with two kinds, so that a pair of onset and rime is one noun
N_ADJECTIVES_PER_LETTER = 4
N_VERBS = 80
N_ACTS = 24  # what a hero does; every hero has two of his own
N_SCENES = 12  # what happens in a topic; every topic has four, two of them shared with each neighbour
_VOWELS = "aeiou"


@dataclass(frozen=True)
class Noun:
    """One noun: a single token, or an onset that fixes its letter and a rime that fixes its kind."""

    kind: int
    letter: int
    words: tuple[str, ...]
    verbs: tuple[int, int]  # the two verbs that go with this noun and few others


def _draw(purpose: str, n: int, n_values: int, n_picked: int) -> list[tuple[int, ...]]:
    """For each of `n` things, `n_picked` distinct numbers below `n_values`; every number is used about equally."""
    generator = random.Random(derive_seed("embedded/vocabulary", purpose))
    picks: list[tuple[int, ...]] = []
    deck: list[int] = []
    while len(picks) < n:
        if len(deck) < n_picked:
            deck = sorted(range(n_values), key=lambda _: generator.random())
        pick, deck = tuple(deck[:n_picked]), deck[n_picked:]
        picks.append(pick)
    return picks


def _one_token_words(letter: str) -> list[str]:
    """Made-up nouns of a letter, in a fixed order: consonant, vowel, consonant, vowel."""
    words = [letter + v + c + w for v, c, w in product(_VOWELS, "gnprvz", "aou")]
    generator = random.Random(derive_seed("embedded/vocabulary", "nouns", letter))
    return sorted(words, key=lambda _: generator.random())


def _nouns() -> tuple[Noun, ...]:
    """All one-token nouns, then all two-token nouns."""
    n_one = len(KINDS) * len(LETTERS) * N_ONE_TOKEN_PER_CELL
    n_two = len(KINDS) * len(LETTERS)
    verbs = _draw("verbs of nouns", n_one + n_two, N_VERBS, 2)
    nouns: list[Noun] = []
    for letter, name in enumerate(LETTERS):
        words = _one_token_words(name)
        for i in range(len(KINDS) * N_ONE_TOKEN_PER_CELL):
            a, b = verbs[len(nouns)]
            nouns.append(Noun(i % len(KINDS), letter, (words[i],), (a, b)))
    for letter, kind in product(range(len(LETTERS)), range(len(KINDS))):
        a, b = verbs[len(nouns)]
        nouns.append(Noun(kind, letter, (ONSETS[letter][kind % N_ONSETS_PER_LETTER], RIMES[kind]), (a, b)))
    return tuple(nouns)


ONSETS = tuple(tuple(letter + ending for ending in ("ru-", "i-", "o-")) for letter in LETTERS)
RIMES = ("-mink", "-hook", "-wort", "-crust", "-felt", "-ham")
ADJECTIVES = tuple(
    tuple(letter + middle + "y" for middle in ("ar", "il", "un", "od")[:N_ADJECTIVES_PER_LETTER]) for letter in LETTERS
)
VERBS = tuple(c + v + d + "es" for c, v, d in product("bghjnprv", _VOWELS, "kt"))[:N_VERBS]
ACTS = tuple(c + v + "shes" for c, v in product("bclmr", _VOWELS))[:N_ACTS]
SCENES = tuple(c + v + "lly" for c, v in product("gjw", _VOWELS))[:N_SCENES]
NOUNS = _nouns()
NOUN_NAMES = tuple("".join(noun.words).replace("--", "").replace("-", "") for noun in NOUNS)
ACTS_OF_HERO = tuple(_draw("acts of heroes", len(HEROES), N_ACTS, 2))
SCENES_OF_TOPIC = tuple(tuple((2 * t + i) % N_SCENES for i in range(4)) for t in range(len(TOPICS)))

LETTER_WORDS = tuple(letter.upper() for letter in LETTERS)  # the answers of the spelling task


def _vocabulary() -> tuple[str, ...]:
    words = [BOS, UNKNOWN, PAUSE, PERIOD, ABOUT, MEET, SLOT, SPELL, SORT, AGAIN]
    words += [*TOPICS, *HEROES, *KINDS, *LETTER_WORDS, *ARTICLES, *PARTICLES]
    words += [word for onsets in ONSETS for word in onsets] + list(RIMES)
    words += [word for adjectives in ADJECTIVES for word in adjectives]
    words += [*VERBS, *ACTS, *SCENES]
    words += [noun.words[0] for noun in NOUNS if len(noun.words) == 1]
    assert len(set(words)) == len(words), "two tokens share a spelling"
    return tuple(words)


VOCABULARY = _vocabulary()
TOKEN_ID = {word: number for number, word in enumerate(VOCABULARY)}
