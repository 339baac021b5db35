"""Documents of the embedded language as text, or as tokens with a label for everything that is true of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache_spec.errors import UserError
from harvest.embedded import vocabulary as words
from harvest.embedded.grammar import Draft, write_document
from harvest.embedded.tables import DOCUMENT_TOKENS

WINDOW_TOKENS = DOCUMENT_TOKENS + 1
LATE_FROM = 32  # from here on a token is far from the word that named the topic

VALUE_NAMES: dict[str, tuple[str, ...]] = {
    "letter": words.LETTERS,
    "kind": words.KINDS,
    "noun": words.NOUN_NAMES,
    "topic": words.TOPICS,
    "hero": words.HEROES,
    "subject_kind": words.KINDS,
    "adjective_letter": words.LETTERS,
}
_AT_TOKEN = ("letter", "kind", "noun", "subject_kind", "adjective_letter")  # attributes of single tokens
_SETS = ("noun_one_token", "noun_rime", "onset", "slot", "spelling_answer", "sorting_answer")


@dataclass(frozen=True)
class Corpus:
    """Documents with their labels.

    tokens: [n_documents, 64] int64, the beginning-of-text token first.
    attributes: name -> [n_documents, 64] int16, an index into `VALUE_NAMES[name]`, -1 where it is not defined.
    positions: name -> [n_documents, 64] bool, named sets of positions.
    """

    tokens: np.ndarray
    attributes: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]


@dataclass(frozen=True)
class Relation:
    """A parent and its children: each value of `child` belongs to exactly one value of `parent`.

    At `positions` the parent is always defined. In the cross-token family the child may be -1, so that the parent
    also occurs without it; in the other two every token has both.
    """

    family: str
    parent: str
    child: str
    positions: str


@dataclass(frozen=True)
class ProbeTask:
    """One probe for every value of `attribute` (this value against the rest), read at `positions`."""

    name: str
    attribute: str
    positions: str


RELATIONS = (
    Relation("same_token", "letter", "noun", "noun_one_token"),
    Relation("two_token", "letter", "noun", "noun_rime"),
    Relation("cross_token", "topic", "hero", "slot"),
)
PROBE_TASKS = (
    ProbeTask("letter", "letter", "noun_one_token"),
    ProbeTask("letter of two tokens", "letter", "noun_rime"),
    ProbeTask("kind", "kind", "noun"),
    ProbeTask("subject kind", "subject_kind", "period"),
    ProbeTask("topic at the slot", "topic", "slot"),
    ProbeTask("topic", "topic", "late"),
)


def generate(n_documents: int, seed: int, shifted: bool = False) -> Corpus:
    """The first `n_documents` documents of the stream, with labels."""
    return label([write_document(seed, shifted, number) for number in range(_counted(n_documents))])


def documents(seed: int, shifted: bool = False) -> Iterator[str]:
    """The same documents as text, without end. Each is 63 tokens."""
    number = 0
    while True:
        yield " ".join(words.VOCABULARY[token] for token in write_document(seed, shifted, number).tokens[1:])
        number += 1


def label(drafts: list[Draft]) -> Corpus:
    """Tokens and labels of written documents."""
    shape = (len(drafts), WINDOW_TOKENS)
    tokens = np.array([draft.tokens for draft in drafts], dtype=np.int64).reshape(shape)
    attributes = {name: np.full(shape, -1, dtype=np.int16) for name in VALUE_NAMES}
    positions = {name: np.zeros(shape, dtype=bool) for name in _SETS}
    for row, draft in enumerate(drafts):
        for name in _AT_TOKEN:
            for position, value in draft.marks.get(name, ()):
                attributes[name][row, position] = value
        for name in ("topic", "hero"):  # true from the word that says it to the end
            for position, value in draft.marks.get(f"{name}_from", ()):
                attributes[name][row, position:] = value
        for name in _SETS:
            for position, _ in draft.marks.get(name, ()):
                positions[name][row, position] = True
    positions["noun"] = positions["noun_one_token"] | positions["noun_rime"]
    positions["period"] = attributes["subject_kind"] >= 0
    positions["late"] = (np.arange(WINDOW_TOKENS) >= LATE_FROM) & ~positions["slot"] & (attributes["topic"] >= 0)
    return Corpus(tokens, attributes, positions)


def ground_truth_features(corpus: Corpus) -> tuple[np.ndarray, list[str]]:
    """What is true of each token: [n_tokens, n_features] bool, and the features' names.

    Rows follow `corpus.tokens.reshape(-1)`. Parents and children first; then the identity of every token that is
    not a noun, since a noun's identity is there as a child already.
    """
    columns: list[np.ndarray] = []
    names: list[str] = []
    for attribute in ("letter", "kind", "topic", "subject_kind", "noun", "hero"):
        values = corpus.attributes[attribute].reshape(-1)
        for value, name in enumerate(VALUE_NAMES[attribute]):
            columns.append(values == value)
            names.append(f"{attribute} {name}")
    nouns = {noun.words[0] for noun in words.NOUNS if len(noun.words) == 1}
    flat = corpus.tokens.reshape(-1)
    for number, word in enumerate(words.VOCABULARY):
        if word not in nouns:
            columns.append(flat == number)
            names.append(f"token {word}")
    return np.stack(columns, axis=1), names


def _counted(n_documents: int) -> int:
    if n_documents < 0:
        raise UserError(f"{n_documents} documents were asked for; ask for 0 or more")
    return n_documents
