"""The words and prompts of the first-letter task, for any tokenizer: ten times `toast has the first letter: T`, a word.

Prompts are put together from token ids, so the place of every word is known and no word is ever split.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

TEMPLATE = "{word} has the first letter: {letter}"
N_EXAMPLES = 10
N_LETTERS = 26
TEST_SHARE = 0.2
_ONE_WORD = re.compile(r"[^\x00-\x7f]?[A-Za-z]{2,}")  # a mark for the space, if the tokenizer has one, and a word


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """Words that are one token each: ids [n], letters [n] (0 for a) and the words themselves."""

    ids: np.ndarray
    letters: np.ndarray
    words: tuple[str, ...]

    def take(self, numbers: np.ndarray) -> "Words":
        """The words of these numbers, in their order."""
        return Words(ids=self.ids[numbers], letters=self.letters[numbers], words=tuple(self.words[i] for i in numbers))


def vocabulary_words(tokenizer: Tokenizer, special_ids: Sequence[int], vocab_size: int) -> Words:
    """Every token that is one word of two or more ASCII letters with a space before it, in the order of the ids.

    Of spellings that differ by case only, the lowest id is kept: in a vocabulary built by merges the most frequent.
    Whether a token brings a space is told by decoding it behind another word, for only the decoder knows how the
    tokenizer marks one; kept are those that the tokenizer itself gives for the word at the start of a line.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(special_ids)
    ids = sorted(i for token, i in vocabulary.items() if _ONE_WORD.fullmatch(token) and i < vocab_size)
    ids = [i for i in ids if i not in special]
    anchor = min((i for token, i in vocabulary.items() if token.isascii() and token.isalnum()), default=None)
    if anchor is None or not ids:
        return Words(ids=np.empty(0, np.int64), letters=np.empty(0, np.int64), words=())
    before = len(_decode(tokenizer, [[anchor]])[0])
    texts = [text[before:] for text in _decode(tokenizer, [[anchor, i] for i in ids])]
    led = [(i, text[1:]) for i, text in zip(ids, texts, strict=True) if _is_led(text)]
    lines = tokenizer([f"\n {word}" for _, word in led], add_special_tokens=False)["input_ids"] if led else []
    kept: dict[str, tuple[int, str]] = {}
    for (i, word), line in zip(led, lines, strict=True):
        if line[-1:] == [i]:
            kept.setdefault(word.lower(), (i, word))
    return Words(
        ids=np.array([i for i, _ in kept.values()], np.int64),
        letters=np.array([ord(word[0]) - ord("a") for word in kept], np.int64),
        words=tuple(word for _, word in kept.values()),
    )


def _is_led(text: str) -> bool:
    return text.startswith(" ") and len(text) > 2 and text[1:].isascii() and text[1:].isalpha()


def _decode(tokenizer: Tokenizer, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def even_draw(words: Words, n_words: int, generator: np.random.Generator) -> Words:
    """About `n_words` words, as many of each letter as there are up to a common number.

    The score is a mean over letters, so the rare ones are worth as much as the frequent ones.
    """
    counts = np.bincount(words.letters, minlength=N_LETTERS)
    most = max(n for n in range(int(counts.max()) + 1) if np.minimum(counts, n).sum() <= n_words)
    drawn = [
        generator.choice(np.flatnonzero(words.letters == letter), min(most, counts[letter]), replace=False)
        for letter in range(N_LETTERS)
    ]
    return words.take(np.concatenate(drawn))


def split(words: Words, generator: np.random.Generator) -> tuple[Words, Words]:
    """Train and test words; of every letter a fifth (rounded) is for testing."""
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for letter in range(N_LETTERS):
        numbers = generator.permutation(np.flatnonzero(words.letters == letter))
        n_test = round(TEST_SHARE * len(numbers))
        parts[0].append(numbers[n_test:])
        parts[1].append(numbers[:n_test])
    return words.take(np.concatenate(parts[0])), words.take(np.concatenate(parts[1]))


def answer_ids(tokenizer: Tokenizer, words: Words) -> tuple[list[list[int]], str]:
    """For each letter, the ids between an example's word and the word of the next line; or none and the reason.

    Read off two lines as the tokenizer cuts them: what stands between the ids of their two words.
    """
    unknown = tokenizer.unk_token_id
    (first, second), found = words.ids[:2].tolist(), []
    for number in range(N_LETTERS):
        letter = chr(ord("A") + number)
        example = TEMPLATE.format(word=words.words[0], letter=letter)
        line = tokenizer(f"\n {example}\n {words.words[1]}", add_special_tokens=False)["input_ids"]
        if unknown is not None and unknown in line:
            return [], (
                f"the tokenizer has no tokens for '{TEMPLATE.format(word='...', letter=letter)}', the sentence that "
                "the first-letter task is asked with"
            )
        if first not in line or line[-1] != second:
            return [], f"the tokenizer joins words with their neighbours in '{example}', so no word's token can be read"
        found.append(line[line.index(first) + 1 : -1])
    return found, ""


def prompts(
    asked: Words, examples: Words, answers: Sequence[Sequence[int]], bos: int | None, generator: np.random.Generator
) -> list[list[int]]:
    """For each asked word the ids of its prompt: ten examples of other words, then the word, which ends it.

    In a causal model nothing that follows a token changes its activation, so the question itself is left out.
    """
    n_drawn = min(N_EXAMPLES + 1, len(examples.ids))  # one spare, for the word itself may be among them
    found = []
    for word in asked.ids:
        drawn = generator.choice(len(examples.ids), n_drawn, replace=False)
        drawn = drawn[examples.ids[drawn] != word][:N_EXAMPLES]
        text = [] if bos is None else [bos]
        for i in drawn:
            text += [int(examples.ids[i]), *answers[int(examples.letters[i])]]
        found.append([*text, int(word)])
    return found
