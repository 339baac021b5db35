"""The embedded grammar against a second, plain telling of it: the next word's distribution after any beginning.

The plain telling looks only at the words said so far and knows nothing of how the generator draws. If the two
disagree on one token, the model card's floor is wrong.
"""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvest.embedded import vocabulary as words
from harvest.embedded.grammar import DocumentFull, Draft, write_document
from harvest.embedded.tables import DOCUMENT_TOKENS, RATES, Tables, Weighted, tables

Shares = dict[str, float]
NOUN_OF = {noun.words: noun for noun in words.NOUNS}
FREQUENCY = dict(zip((noun.words for noun in words.NOUNS), tables().noun_given_kind, strict=True))
FORCED_KIND, FORCED_LETTER = (RATES.topic_kind, 0.0), (RATES.alliteration, 0.0)  # in distribution, shifted


def _mix(*parts: tuple[float, Shares]) -> Shares:
    total: Shares = {}
    for weight, shares in parts:
        for word, share in shares.items():
            if weight * share > 0:
                total[word] = total.get(word, 0.0) + weight * share
    return total


def _even(names: tuple[str, ...] | list[str]) -> Shares:
    return _mix(*((1 / len(names), {name: 1.0}) for name in names))


def _kinds(topic: int, shifted: int) -> list[float]:
    forced, n = FORCED_KIND[shifted], len(words.KINDS)
    return [(1 - forced) / n + (forced if kind == topic else 0.0) for kind in range(n)]


def _nouns(topic: int, shifted: int) -> dict[tuple[str, ...], float]:
    kinds = _kinds(topic, shifted)
    return {noun.words: kinds[noun.kind] * FREQUENCY[noun.words] for noun in words.NOUNS}


def _continue_noun(said: tuple[str, ...], candidates: dict[tuple[str, ...], float]) -> Shares:
    """The next word of a noun of which the words in `said` are there already."""
    fitting = {noun: share for noun, share in candidates.items() if noun[: len(said)] == said}
    total = math.fsum(fitting.values())
    return _mix(*((share / total, {noun[len(said)]: 1.0}) for noun, share in fitting.items()))


def _take_noun(sentence: list[str]) -> tuple[str, ...] | None:
    """The noun at the start of these words, or None while it is not whole."""
    for n in (1, 2):
        if tuple(sentence[:n]) in NOUN_OF:
            return tuple(sentence[:n])
    return None


def _verb(noun: words.Noun) -> Shares:
    own = _even([words.VERBS[verb] for verb in noun.verbs])
    return _mix((RATES.own_verb, own), (1 - RATES.own_verb, _even(words.VERBS)))


def _after_noun(noun: words.Noun, rest: list[str], topic: int, shifted: int) -> Shares:
    """The next word of a noun sentence, `rest` being what was said after the noun."""
    every = [word for of_letter in words.ADJECTIVES for word in of_letter]
    if rest and rest[0] in every:
        rest = rest[1:]
    elif not rest:
        forced = FORCED_LETTER[shifted]
        adjective = _mix((forced, _even(words.ADJECTIVES[noun.letter])), (1 - forced, _even(every)))
        return _mix((RATES.adjective, adjective), (1 - RATES.adjective, _verb(noun)))
    if not rest:
        return _verb(noun)
    if len(rest) == 1:
        return {words.PARTICLES[noun.kind]: 1.0}
    if len(rest) == 2:
        own = [words.SCENES[scene] for scene in words.SCENES_OF_TOPIC[topic]]
        scene = _mix((RATES.own_scene, _even(own)), (1 - RATES.own_scene, _even(words.SCENES)))
        return _mix((RATES.scene, scene), (1 - RATES.scene, {words.PERIOD: 1.0}))
    return {words.PERIOD: 1.0}


def _start(n_sentences: int, topic: int, hero: int | None, last: tuple[str, ...] | None, shifted: int) -> Shares:
    meet = RATES.meet[n_sentences] if hero is None and n_sentences < len(RATES.meet) else 0.0
    noun, slot, spelling, sorting, repetition = RATES.sentence
    if last is None:
        noun, repetition = noun + repetition, 0.0
    articles = _mix(*((p, {words.ARTICLES[kind]: 1.0}) for kind, p in enumerate(_kinds(topic, shifted))))
    bare = _continue_noun((), _nouns(topic, shifted))
    usual = _mix(
        (noun * RATES.article, articles),
        (noun * (1 - RATES.article), bare),
        (slot, {words.SLOT: 1.0}),
        (spelling, {words.SPELL: 1.0}),
        (sorting, {words.SORT: 1.0}),
        (repetition, {words.AGAIN: 1.0}),
    )
    return _mix((meet, {words.MEET: 1.0}), (1 - meet, usual))


def _slot(topic: int, hero: int | None) -> Shares:
    every, scenes = _even(words.ACTS + words.SCENES), _even([words.SCENES[s] for s in words.SCENES_OF_TOPIC[topic]])
    if hero is None:
        return _mix((RATES.slot_scene, scenes), (1 - RATES.slot_scene, every))
    acts = _even([words.ACTS[act] for act in words.ACTS_OF_HERO[hero]])
    rest = 1 - RATES.slot_hero_act - RATES.slot_hero_scene
    return _mix((RATES.slot_hero_act, acts), (RATES.slot_hero_scene, scenes), (rest, every))


def _hero_names(topic: int) -> Shares:
    weights = [(rank + 1) ** -RATES.hero_zipf for rank in range(len(words.HEROES_OF_TOPIC[topic]))]
    pairs = zip(weights, words.HEROES_OF_TOPIC[topic], strict=True)
    return _mix(*((weight / math.fsum(weights), {name: 1.0}) for weight, name in pairs))


def next_words(said: list[str], shifted: int) -> Shares:
    """Every word that may follow, with its probability. `said` has no pauses and no beginning-of-text token."""
    sentences: list[list[str]] = [[]]
    for word in said:
        sentences[-1].append(word)
        if word == words.PERIOD:
            sentences.append([])
    *whole, now = sentences
    if not whole:  # about TOPIC .
        return [{words.ABOUT: 1.0}, _even(words.TOPICS), {words.PERIOD: 1.0}][len(now)]
    topic = words.TOPICS.index(whole[0][1])
    hero = next((words.HEROES.index(s[1]) for s in whole if s[0] == words.MEET), None)
    tasks = (words.SPELL, words.SORT, words.AGAIN, *words.ARTICLES)
    starts = [s[1:] if s[0] in tasks else s for s in whole[1:]]
    last = next((noun for noun in map(_take_noun, reversed(starts)) if noun), None)
    if not now:
        return _start(len(whole) - 1, topic, hero, last, shifted)
    return _inside(now, topic, hero, last, shifted)


def _inside(now: list[str], topic: int, hero: int | None, last: tuple[str, ...] | None, shifted: int) -> Shares:
    first, rest = now[0], now[1:]
    if first in (words.MEET, words.SLOT):
        options = _hero_names(topic) if first == words.MEET else _slot(topic, hero)
        return {words.PERIOD: 1.0} if rest else options
    candidates = _nouns(topic, shifted)
    if first in words.ARTICLES:
        kind = words.ARTICLES.index(first)
        candidates = {noun: share for noun, share in candidates.items() if NOUN_OF[noun].kind == kind}
    elif first == words.AGAIN:
        assert last is not None
        candidates = {last: 1.0}
    elif first not in (words.SPELL, words.SORT):
        rest = now
    found = _take_noun(rest)
    if found is None:
        return _continue_noun(tuple(rest), candidates)
    noun, after = NOUN_OF[found], rest[len(found) :]
    if first in (words.SPELL, words.SORT) and not after:
        return {words.LETTER_WORDS[noun.letter] if first == words.SPELL else words.KINDS[noun.kind]: 1.0}
    if first in (words.SPELL, words.SORT, words.AGAIN):
        return {words.PERIOD: 1.0}
    return _after_noun(noun, after, topic, shifted)


@given(seed=st.integers(0, 2**31), shifted=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_written_probability_is_the_plain_one(seed: int, shifted: bool) -> None:
    draft = write_document(seed, shifted, 0)
    said: list[str] = []
    for token, written in zip(draft.tokens[1:], draft.probabilities, strict=True):
        word = words.VOCABULARY[token]
        if word == words.PAUSE:
            assert written == pytest.approx((RATES.pause, RATES.pause))
            continue
        for distribution in (0, 1):
            expected = next_words(said, distribution)
            assert math.fsum(expected.values()) == pytest.approx(1.0)
            assert written[distribution] == pytest.approx(expected[word] * (1 - RATES.pause), rel=1e-9), (said, word)
        said.append(word)


@pytest.mark.parametrize("shifted", [0, 1])
def test_second_sentences_begin_as_often_as_the_plain_telling_says(shifted: int) -> None:
    counts: dict[str, dict[str, int]] = {}
    for number in range(6_000):
        draft = write_document(8, bool(shifted), number)
        said = [words.VOCABULARY[token] for token in draft.tokens[1:] if token != words.TOKEN_ID[words.PAUSE]]
        of_topic = counts.setdefault(said[1], {})
        of_topic[said[3]] = of_topic.get(said[3], 0) + 1
    for topic, seen in counts.items():
        n = sum(seen.values())
        for word, share in next_words([words.ABOUT, topic, words.PERIOD], shifted).items():
            if share * n >= 5:  # rarer words say nothing at this size
                assert seen.get(word, 0) / n == pytest.approx(share, abs=5 * math.sqrt(share / n)), (topic, word)


def test_a_document_ends_exactly_where_the_window_ends() -> None:
    draft = Draft(generator=_Never(), shifted=False)
    for _ in range(DOCUMENT_TOKENS):
        draft.emit(words.PERIOD, 1.0)
    with pytest.raises(DocumentFull):
        draft.emit(words.PERIOD, 1.0)
    assert len(draft.tokens) == DOCUMENT_TOKENS + 1
    assert len(draft.probabilities) == DOCUMENT_TOKENS


class _Never(random.Random):
    """A generator for which no chance ever comes true."""

    def random(self) -> float:
        return 0.999999


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.floats(0.0, 1.0, exclude_max=True))
def test_a_draw_falls_where_the_running_sum_says(weights: list[float], uniform: float) -> None:
    shares = [weight / math.fsum(weights) for weight in weights]
    index = Weighted(shares).draw(uniform)
    below = math.fsum(shares[:index])
    assert below - 1e-9 <= uniform <= below + shares[index] + 1e-9


def test_frequent_and_rare_nouns_of_a_kind_follow_zipf() -> None:
    t: Tables = tables()
    for ranked in t.nouns_of_kind:
        shares = np.array([t.noun_given_kind[noun] for noun in ranked])
        assert shares.sum() == pytest.approx(1.0)
        assert shares[0] / shares[9] == pytest.approx(10.0)


def test_a_topic_shares_its_scenes_with_other_topics() -> None:
    """One scene word does not give a topic away; only the word that names it does."""
    for scene in range(words.N_SCENES):
        assert sum(scene in own for own in words.SCENES_OF_TOPIC) == 2
