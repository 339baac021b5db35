"""How a document of the embedded language is written, with labels and exact probabilities.

A document opens with `about TOPIC .`; most documents also say `meet HERO .` soon after. Then come sentences:

* noun sentence   [article] NOUN [adjective] verb particle [scene] .     article and particle follow the noun's kind,
                  the adjective tends to start with its letter, the verb belongs to the noun
* slot sentence   they WORD .         WORD depends strongly on the hero, weakly on the topic
* spelling        spell NOUN LETTER .
* sorting         sort NOUN KIND .
* repetition      again NOUN .        the last noun of the document

In distribution a topic brings its own kind of noun, and adjectives alliterate. In the shifted distribution both
habits are gone. Nothing else differs.

Every draw is made just before the token that shows it, so the probability of each token given the tokens before
it is known exactly, once for each distribution.
"""

import random
from dataclasses import dataclass, field

from cache_spec.seeds import derive_seed
from harvest.embedded import vocabulary as words
from harvest.embedded.tables import DOCUMENT_TOKENS, RATES, SLOT_WORDS, Weighted, tables
from harvest.embedded.vocabulary import TOKEN_ID


class DocumentFull(Exception):
    """Raised by the token that no longer fits; whatever was being said is cut there."""


@dataclass
class Draft:
    """A document under way. `marks[name]` lists (position, value); position 0 is the beginning-of-text token."""

    generator: random.Random
    shifted: bool
    tokens: list[int] = field(default_factory=lambda: [TOKEN_ID[words.BOS]])
    probabilities: list[tuple[float, float]] = field(default_factory=list)  # (in distribution, shifted) per token
    marks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    topic: int = -1
    hero: int = -1
    last_noun: int = -1

    def emit(self, word: str, *probability: float) -> None:
        """Write a word after as many pauses as chance brings; one probability, or (in distribution, shifted)."""
        while self.generator.random() < RATES.pause:
            self._append(words.PAUSE, RATES.pause, RATES.pause)
        stay = 1.0 - RATES.pause
        self._append(word, probability[0] * stay, probability[-1] * stay)

    def _append(self, word: str, probability: float, probability_shifted: float) -> None:
        if len(self.tokens) > DOCUMENT_TOKENS:
            raise DocumentFull
        self.tokens.append(TOKEN_ID[word])
        self.probabilities.append((probability, probability_shifted))

    def mark(self, name: str, value: int) -> None:
        """Label the token just written."""
        self.marks.setdefault(name, []).append((len(self.tokens) - 1, value))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.generator.random() < probability

    def pick(self, weighted: Weighted) -> int:
        """An index drawn with these weights."""
        return weighted.draw(self.generator.random())

    def below(self, n: int) -> int:
        """A whole number in [0, n), all equally likely."""
        return int(self.generator.random() * n)


def _draw_noun(draft: Draft) -> int:
    """A noun that fits the topic (in distribution) or any noun (shifted)."""
    t = tables()
    kind = draft.pick(t.kind[draft.shifted][draft.topic])
    return t.nouns_of_kind[kind][draft.pick(t.rank)]


def _write_noun(draft: Draft, noun: int, before: float, *, kind_known: bool = False, noun_known: bool = False) -> None:
    """The one or two tokens of a noun, labelled. `before` multiplies the first token's probability."""
    t, entry = tables(), words.NOUNS[noun]
    if noun_known:
        first = whole = (1.0, 1.0)
    elif kind_known:
        first = whole = (t.noun_given_kind[noun],) * 2
    else:
        first = tuple(t.onset[shifted][draft.topic][entry.words[0]] for shifted in (0, 1))
        whole = tuple(t.noun[shifted][draft.topic][noun] for shifted in (0, 1))
    draft.emit(entry.words[0], before * first[0], before * first[1])
    draft.mark("letter", entry.letter)
    if len(entry.words) == 2:
        draft.mark("onset", 1)
        draft.emit(entry.words[1], whole[0] / first[0], whole[1] / first[1])
        draft.mark("letter", entry.letter)
    draft.mark("kind", entry.kind)
    draft.mark("noun", noun)
    draft.mark("noun_one_token" if len(entry.words) == 1 else "noun_rime", 1)
    draft.last_noun = noun


def _noun_sentence(draft: Draft, before: float) -> None:
    noun = _draw_noun(draft)
    entry, t = words.NOUNS[noun], tables()
    if draft.chance(RATES.article):
        kind = [before * RATES.article * t.kind[shifted][draft.topic].shares[entry.kind] for shifted in (0, 1)]
        draft.emit(words.ARTICLES[entry.kind], *kind)
        _write_noun(draft, noun, 1.0, kind_known=True)
    else:
        _write_noun(draft, noun, before * (1.0 - RATES.article))
    before_verb = 1.0 - RATES.adjective
    if draft.chance(RATES.adjective):
        _write_adjective(draft, entry.letter)
        before_verb = 1.0
    verb = entry.verbs[draft.below(2)]
    if not draft.chance(RATES.own_verb):
        verb = draft.below(words.N_VERBS)
    share = RATES.own_verb * (verb in entry.verbs) / 2 + (1 - RATES.own_verb) / words.N_VERBS
    draft.emit(words.VERBS[verb], before_verb * share)
    draft.emit(words.PARTICLES[entry.kind], 1.0)
    if draft.chance(RATES.scene):
        _write_scene(draft)
        draft.emit(words.PERIOD, 1.0)
    else:
        draft.emit(words.PERIOD, 1.0 - RATES.scene)
    draft.mark("subject_kind", entry.kind)


def _write_adjective(draft: Draft, letter: int) -> None:
    forced = (RATES.alliteration, 0.0)
    n_letters, n_each = len(words.LETTERS), words.N_ADJECTIVES_PER_LETTER
    chosen = letter
    if not draft.chance(forced[draft.shifted]):
        chosen = draft.below(n_letters)
    word = draft.below(n_each)
    share = [RATES.adjective * (f * (chosen == letter) + (1 - f) / n_letters) / n_each for f in forced]
    draft.emit(words.ADJECTIVES[chosen][word], *share)
    draft.mark("adjective_letter", chosen)


def _write_scene(draft: Draft) -> None:
    own = words.SCENES_OF_TOPIC[draft.topic]
    scene = own[draft.below(len(own))]
    if not draft.chance(RATES.own_scene):
        scene = draft.below(words.N_SCENES)
    share = RATES.own_scene * (scene in own) / len(own) + (1 - RATES.own_scene) / words.N_SCENES
    draft.emit(words.SCENES[scene], RATES.scene * share)


def _slot_sentence(draft: Draft, before: float) -> None:
    draft.emit(words.SLOT, before)
    draft.mark("slot", 1)
    row = tables().slot[draft.topic][draft.hero if draft.hero >= 0 else len(words.HEROES)]
    word = draft.pick(row)
    draft.emit(SLOT_WORDS[word], row.shares[word])
    draft.emit(words.PERIOD, 1.0)


def _task_sentence(draft: Draft, task: str, before: float) -> None:
    """spell NOUN LETTER, or sort NOUN KIND: the answer is certain and labelled one token before."""
    noun = _draw_noun(draft)
    draft.emit(task, before)
    _write_noun(draft, noun, 1.0)
    entry = words.NOUNS[noun]
    answer = words.LETTER_WORDS[entry.letter] if task == words.SPELL else words.KINDS[entry.kind]
    draft.emit(answer, 1.0)
    draft.mark("spelling_answer" if task == words.SPELL else "sorting_answer", 1)
    draft.emit(words.PERIOD, 1.0)


def _sentence(draft: Draft, before: float) -> None:
    shares = tables().sentence[draft.last_noun >= 0]
    choice = draft.pick(shares)
    before *= shares.shares[choice]
    if choice == 0:
        _noun_sentence(draft, before)
    elif choice == 1:
        _slot_sentence(draft, before)
    elif choice == 2:
        _task_sentence(draft, words.SPELL, before)
    elif choice == 3:
        _task_sentence(draft, words.SORT, before)
    else:
        draft.emit(words.AGAIN, before)
        _write_noun(draft, draft.last_noun, 1.0, noun_known=True)
        draft.emit(words.PERIOD, 1.0)


def _opening(draft: Draft) -> None:
    topic = draft.below(len(words.TOPICS))
    draft.emit(words.ABOUT, 1.0)
    draft.emit(words.TOPICS[topic], 1.0 / len(words.TOPICS))
    draft.topic = topic
    draft.mark("topic_from", topic)
    draft.emit(words.PERIOD, 1.0)


def _meeting(draft: Draft, before: float) -> None:
    t = tables()
    rank = draft.pick(t.hero_rank)
    hero = t.heroes_of_topic[draft.topic][rank]
    draft.emit(words.MEET, before)
    draft.emit(words.HEROES[hero], t.hero_rank.shares[rank])
    draft.hero = hero
    draft.mark("hero_from", hero)
    draft.emit(words.PERIOD, 1.0)


def write_document(seed: int, shifted: bool, number: int) -> Draft:
    """Document `number` of a stream: the same whatever else is drawn. It has exactly `DOCUMENT_TOKENS` tokens."""
    draft = Draft(random.Random(derive_seed("embedded/document", seed, int(shifted), number)), shifted)
    try:
        _opening(draft)
        boundary = 0
        while True:
            meet = RATES.meet[boundary] if draft.hero < 0 and boundary < len(RATES.meet) else 0.0
            if draft.chance(meet):
                _meeting(draft, meet)
            else:
                _sentence(draft, 1.0 - meet)
            boundary += 1
    except DocumentFull:
        return draft
