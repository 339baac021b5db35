"""The words of the embedded language: who belongs to whom, for every word."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from harvest import embedded
from harvest.embedded import vocabulary as words


def test_every_word_has_one_spelling_and_one_number() -> None:
    assert len(set(words.VOCABULARY)) == len(words.VOCABULARY)
    assert [words.TOKEN_ID[word] for word in words.VOCABULARY] == list(range(len(words.VOCABULARY)))
    assert not any(" " in word or word != word.strip() for word in words.VOCABULARY)


def test_everything_that_can_be_said_is_in_the_vocabulary() -> None:
    said = {word for noun in words.NOUNS for word in noun.words}
    said |= {word for group in (*words.ONSETS, *words.ADJECTIVES) for word in group}
    said |= {*words.TOPICS, *words.HEROES, *words.KINDS, *words.LETTER_WORDS, *words.ARTICLES, *words.PARTICLES}
    said |= {*words.VERBS, *words.ACTS, *words.SCENES, *words.RIMES}
    assert said <= set(words.VOCABULARY)


def test_sizes_are_the_documented_ones() -> None:
    assert len(words.VERBS) == words.N_VERBS
    assert len(words.ACTS) == words.N_ACTS
    assert len(words.SCENES) == words.N_SCENES
    assert len(words.ARTICLES) == len(words.PARTICLES) == len(words.RIMES) == len(words.KINDS)
    assert all(len(group) == words.N_ONSETS_PER_LETTER for group in words.ONSETS)
    assert all(len(group) == words.N_ADJECTIVES_PER_LETTER for group in words.ADJECTIVES)


def test_every_letter_and_kind_has_its_share_of_nouns() -> None:
    one = Counter((noun.letter, noun.kind) for noun in words.NOUNS if len(noun.words) == 1)
    two = Counter((noun.letter, noun.kind) for noun in words.NOUNS if len(noun.words) == 2)
    cells = len(words.LETTERS) * len(words.KINDS)
    assert len(one) == len(two) == cells
    assert set(one.values()) == {words.N_ONE_TOKEN_PER_CELL}
    assert set(two.values()) == {1}


def test_an_onset_fixes_the_letter_a_rime_the_kind_and_both_the_noun() -> None:
    letters: dict[str, set[int]] = {}
    kinds: dict[str, set[int]] = {}
    for noun in words.NOUNS:
        if len(noun.words) == 2:
            letters.setdefault(noun.words[0], set()).add(noun.letter)
            kinds.setdefault(noun.words[1], set()).add(noun.kind)
    assert all(len(found) == 1 for found in (*letters.values(), *kinds.values()))
    pairs = [noun.words for noun in words.NOUNS]
    assert len(set(pairs)) == len(pairs)
    onsets = Counter(noun.words[0] for noun in words.NOUNS if len(noun.words) == 2)
    assert min(onsets.values()) == 2, "an onset with one noun would be the noun already"


def test_nouns_and_adjectives_begin_with_their_letter() -> None:
    for noun, name in zip(words.NOUNS, words.NOUN_NAMES, strict=True):
        assert name.startswith(words.LETTERS[noun.letter])
        assert "-" not in name
    for letter, group in zip(words.LETTERS, words.ADJECTIVES, strict=True):
        assert all(word.startswith(letter) for word in group)


def test_every_hero_belongs_to_one_topic_and_topics_are_alike() -> None:
    assert len(set(words.HEROES)) == len(words.HEROES) == len(words.TOPIC_OF_HERO)
    for hero, topic in enumerate(words.TOPIC_OF_HERO):
        assert words.HEROES[hero] in words.HEROES_OF_TOPIC[topic]
    assert len(set(Counter(words.TOPIC_OF_HERO).values())) == 1


def test_what_a_hero_does_tells_neither_his_topic_nor_him_alone() -> None:
    topics_of_act: dict[int, set[int]] = {}
    for hero, acts in enumerate(words.ACTS_OF_HERO):
        assert len(set(acts)) == 2
        for act in acts:
            topics_of_act.setdefault(act, set()).add(words.TOPIC_OF_HERO[hero])
    assert len(topics_of_act) == words.N_ACTS
    assert all(len(topics) >= 2 for topics in topics_of_act.values())


def test_verbs_are_shared_evenly_and_tell_no_letter() -> None:
    uses = Counter(verb for noun in words.NOUNS for verb in noun.verbs)
    assert len(uses) == words.N_VERBS
    assert max(uses.values()) - min(uses.values()) <= 1
    letters: dict[int, set[int]] = {}
    for noun in words.NOUNS:
        assert noun.verbs[0] != noun.verbs[1]
        for verb in noun.verbs:
            letters.setdefault(verb, set()).add(noun.letter)
    assert all(len(found) >= 2 for found in letters.values())


@pytest.mark.parametrize("relation", embedded.RELATIONS, ids=lambda relation: relation.family)
def test_relations_and_tasks_name_things_that_exist(relation: embedded.Relation) -> None:
    corpus = embedded.generate(2, seed=0)
    assert {relation.parent, relation.child} <= set(corpus.attributes)
    assert relation.positions in corpus.positions
    for task in embedded.PROBE_TASKS:
        assert task.attribute in corpus.attributes
        assert task.positions in corpus.positions
    assert len({task.name for task in embedded.PROBE_TASKS}) == len(embedded.PROBE_TASKS)


def test_the_language_needs_neither_torch_nor_transformers() -> None:
    """Text and labels are cheap to import; only training and measuring the model pull in the rest."""
    code = "import sys; import harvest.embedded; print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_words_do_not_depend_on_the_hash_seed() -> None:
    code = "from harvest.embedded import generate, vocabulary as w; print(w.VOCABULARY, generate(3, 1).tokens.sum())"
    root, printed = Path(__file__).parent.parent, set()
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
        )
        printed.add(ran.stdout)
    assert len(printed) == 1
