"""The embedded language: labels that are true, documents that stand alone, habits that the shift breaks."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec.errors import UserError
from harvest import embedded
from harvest.embedded import vocabulary as words
from harvest.embedded.entropy import ideal_losses, known_distribution_losses
from harvest.embedded.grammar import write_document
from harvest.embedded.tables import SLOT_WORDS, tables

N_DOCUMENTS = 1_500


@pytest.fixture(scope="module")
def corpus() -> embedded.Corpus:
    return embedded.generate(N_DOCUMENTS, seed=11)


@pytest.fixture(scope="module")
def shifted() -> embedded.Corpus:
    return embedded.generate(N_DOCUMENTS, seed=11, shifted=True)


def _texts(corpus: embedded.Corpus) -> np.ndarray:
    return np.array(words.VOCABULARY)[corpus.tokens]


@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), shifted=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_document_does_not_depend_on_how_many_are_drawn(seed: int, n: int, shifted: bool) -> None:
    few, many = embedded.generate(n, seed, shifted), embedded.generate(n + 5, seed, shifted)
    assert np.array_equal(few.tokens, many.tokens[:n])
    for name, values in few.attributes.items():
        assert np.array_equal(values, many.attributes[name][:n]), name
    for name, values in few.positions.items():
        assert np.array_equal(values, many.positions[name][:n]), name


@given(seed=st.integers(0, 2**31), shifted=st.booleans())
@settings(max_examples=15, deadline=None)
def test_texts_and_tokens_are_the_same_documents(seed: int, shifted: bool) -> None:
    corpus = embedded.generate(3, seed, shifted)
    texts = list(itertools.islice(embedded.documents(seed, shifted), 3))
    for text, row in zip(texts, _texts(corpus), strict=True):
        assert text.split(" ") == list(row[1:])
        assert row[0] == words.BOS
        assert len(row) == embedded.WINDOW_TOKENS == 64


def test_seeds_and_distributions_give_other_documents(corpus: embedded.Corpus, shifted: embedded.Corpus) -> None:
    other = embedded.generate(N_DOCUMENTS, seed=12)
    for a, b in ((corpus, other), (corpus, shifted)):
        same = (a.tokens == b.tokens).all(axis=1)
        assert not same.any()


def test_a_corpus_has_the_promised_shapes_and_types(corpus: embedded.Corpus) -> None:
    shape = (N_DOCUMENTS, embedded.WINDOW_TOKENS)
    assert corpus.tokens.shape == shape
    assert corpus.tokens.dtype == np.int64
    assert set(corpus.attributes) == set(embedded.VALUE_NAMES)
    for name, values in corpus.attributes.items():
        assert values.shape == shape
        assert values.dtype == np.int16
        assert values.min() >= -1
        assert values.max() < len(embedded.VALUE_NAMES[name])
    for values in corpus.positions.values():
        assert values.shape == shape
        assert values.dtype == bool
        assert values.any()
        assert not values[:, 0].any()


@pytest.mark.parametrize("relation", embedded.RELATIONS, ids=lambda relation: relation.family)
def test_a_child_implies_one_parent_and_the_parent_is_always_known(
    relation: embedded.Relation, corpus: embedded.Corpus, shifted: embedded.Corpus
) -> None:
    parents_of: dict[int, set[int]] = {}
    for each in (corpus, shifted):
        where = each.positions[relation.positions]
        parent, child = each.attributes[relation.parent][where], each.attributes[relation.child][where]
        assert (parent >= 0).all()
        for p, c in set(zip(parent.tolist(), child.tolist(), strict=True)):
            if c >= 0:
                parents_of.setdefault(c, set()).add(p)
    assert all(len(parents) == 1 for parents in parents_of.values())
    children = [next(iter(parents)) for parents in parents_of.values()]
    counts = np.bincount(children, minlength=len(embedded.VALUE_NAMES[relation.parent]))
    assert counts.min() >= 2, "a parent with a single child cannot be told from it"


def test_families_are_the_three_promised_ones() -> None:
    assert {relation.family for relation in embedded.RELATIONS} == {"same_token", "two_token", "cross_token"}


def test_the_slot_is_one_word_whatever_parent_and_child(corpus: embedded.Corpus) -> None:
    slot = corpus.positions["slot"]
    assert set(corpus.tokens[slot]) == {words.TOKEN_ID[words.SLOT]}
    hero = corpus.attributes["hero"][slot]
    assert 0.2 < (hero < 0).mean() < 0.6  # the parent is often there without a child
    assert len(set(hero[hero >= 0])) == len(words.HEROES)


def test_topic_and_hero_are_said_by_different_earlier_tokens(corpus: embedded.Corpus) -> None:
    texts = _texts(corpus)
    for row in range(200):
        slots = np.flatnonzero(corpus.positions["slot"][row])
        topic = words.TOPICS[corpus.attributes["topic"][row, -1]]
        topic_at = np.flatnonzero(texts[row] == topic)
        assert len(topic_at) == 1
        for slot in slots:
            hero = corpus.attributes["hero"][row, slot]
            if hero >= 0:
                hero_at = np.flatnonzero(texts[row] == words.HEROES[hero])
                assert len(hero_at) == 1
                assert topic_at[0] < hero_at[0] < slot


def test_noun_labels_spell_the_noun(corpus: embedded.Corpus) -> None:
    texts = _texts(corpus)
    for row, position in np.argwhere(corpus.positions["noun"])[:3000]:
        noun = words.NOUNS[corpus.attributes["noun"][row, position]]
        assert texts[row, position] == noun.words[-1]
        assert corpus.attributes["kind"][row, position] == noun.kind
        assert corpus.attributes["letter"][row, position] == noun.letter
        assert noun.words[0].startswith(words.LETTERS[noun.letter])
    rimes = np.argwhere(corpus.positions["noun_rime"])
    before = [[t for t in texts[row, :position] if t != words.PAUSE][-1] for row, position in rimes]
    nouns = corpus.attributes["noun"][corpus.positions["noun_rime"]]
    assert before == [words.NOUNS[noun].words[0] for noun in nouns]


def test_answers_of_the_tasks_are_right(corpus: embedded.Corpus) -> None:
    texts = _texts(corpus)
    for positions, attribute, names in (
        ("spelling_answer", "letter", words.LETTER_WORDS),
        ("sorting_answer", "kind", words.KINDS),
    ):
        for row, position in np.argwhere(corpus.positions[positions]):
            known = corpus.attributes[attribute][row, :position]
            assert texts[row, position] == names[known[known >= 0][-1]]


def _kind_agreement(corpus: embedded.Corpus) -> float:
    """Share of noun sentences whose kind is the topic's own."""
    where = corpus.positions["period"]
    topic, kind = corpus.attributes["topic"][where], corpus.attributes["subject_kind"][where]
    return float((kind == topic % len(words.KINDS)).mean())


def _alliteration(corpus: embedded.Corpus) -> float:
    """Share of adjectives that begin like the noun before them."""
    hits: list[bool] = []
    for row, position in np.argwhere(corpus.attributes["adjective_letter"] >= 0):
        letters = corpus.attributes["letter"][row, :position]
        hits.append(letters[letters >= 0][-1] == corpus.attributes["adjective_letter"][row, position])
    return float(np.mean(hits))


def test_the_shift_breaks_the_two_habits(corpus: embedded.Corpus, shifted: embedded.Corpus) -> None:
    assert _kind_agreement(corpus) == pytest.approx(0.85 + 0.15 / 6, abs=0.03)
    assert _kind_agreement(shifted) == pytest.approx(1 / 6, abs=0.03)
    assert _alliteration(corpus) == pytest.approx(0.85 + 0.15 / 8, abs=0.03)
    assert _alliteration(shifted) == pytest.approx(1 / 8, abs=0.03)


def test_the_shift_leaves_the_slot_alone(corpus: embedded.Corpus, shifted: embedded.Corpus) -> None:
    rates = [np.bincount(each.attributes["hero"][each.positions["slot"]] + 1) for each in (corpus, shifted)]
    a, b = (counts / counts.sum() for counts in rates)
    assert np.abs(a - b).max() < 0.03


def test_pauses_are_one_in_a_hundred_words(corpus: embedded.Corpus) -> None:
    assert 0.01 < (corpus.tokens == words.TOKEN_ID[words.PAUSE]).mean() < 0.02


def test_no_letter_is_tied_to_a_kind(corpus: embedded.Corpus) -> None:
    where = corpus.positions["noun"]
    counts = np.zeros((len(words.LETTERS), len(words.KINDS)))
    np.add.at(counts, (corpus.attributes["letter"][where], corpus.attributes["kind"][where]), 1)
    shares = counts / counts.sum(axis=0)
    assert shares.max() < 0.35


def test_ground_truth_features_follow_the_labels(corpus: embedded.Corpus) -> None:
    few = embedded.generate(40, seed=11)
    features, names = embedded.ground_truth_features(few)
    assert features.shape == (few.tokens.size, len(names))
    assert features.dtype == bool
    assert len(set(names)) == len(names)
    column = features[:, names.index(f"topic {words.TOPICS[0]}")].reshape(few.tokens.shape)
    assert np.array_equal(column, few.attributes["topic"] == 0)
    slot = features[:, names.index(f"token {words.SLOT}")].reshape(few.tokens.shape)
    assert np.array_equal(slot, few.positions["slot"])


def test_probabilities_of_choices_sum_to_one() -> None:
    t = tables()
    for shifted, topic in itertools.product((0, 1), range(len(words.TOPICS))):
        assert math.fsum(t.noun[shifted][topic]) == pytest.approx(1.0)
        assert math.fsum(t.onset[shifted][topic].values()) == pytest.approx(1.0)
        assert math.fsum(t.kind[shifted][topic].shares) == pytest.approx(1.0)
    for rows in t.slot:
        for row in rows:
            assert len(row.shares) == len(SLOT_WORDS)
            assert math.fsum(row.shares) == pytest.approx(1.0)


@pytest.mark.parametrize("shifted", [False, True])
def test_written_probabilities_are_those_of_the_documents(shifted: bool) -> None:
    """The mean of p_other / p_own over documents is 1 if both are exact, as every prefix is possible under both."""
    written = [write_document(3, shifted, number).probabilities[:16] for number in range(6_000)]
    logs = np.log(np.array(written)).sum(axis=1)  # [n_documents, 2]
    ratio = np.exp(logs[:, int(not shifted)] - logs[:, int(shifted)])
    assert ratio.std() > 0.3
    assert ratio.mean() == pytest.approx(1.0, abs=4 * ratio.std() / math.sqrt(len(ratio)))


def test_the_floor_knows_less_than_one_who_is_told_the_distribution() -> None:
    both = [write_document(5, shifted, number) for shifted in (False, True) for number in range(300)]
    ideal, told = ideal_losses(both), known_distribution_losses(both)
    assert ideal.shape == told.shape == (600, 63)
    assert 0.0 < ideal.mean() - told.mean() < math.log(2) / 63 + 1e-9  # which distribution is one bit a document
    assert (ideal > 0).all()


def test_a_negative_number_of_documents_is_refused() -> None:
    with pytest.raises(UserError, match="-1 documents"):
        embedded.generate(-1, seed=0)
