"""Words: the tokens between two starts are what whitespace separates, for every way of marking a space."""

import numpy as np
import pytest
from harvest_fixtures import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harvest import embedded
from harvest.masking import special_tokens
from harvest.words import word_starts

VOCABULARY = ["the", "harvester", "un", "harvested", "don't", "wheat,", "(grain)", "end.", "naïve", "數據", "x1"]
CORPUS = [" ".join(VOCABULARY[i:] + VOCABULARY[:i]) + "\nthe un\n" for i in range(len(VOCABULARY))]


def _wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


def _byte_level(add_prefix_space):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


def _sentence_piece():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<bos>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


def _byte_fallback():
    """As Llama-2: spaces are ▁, what is not in the vocabulary is bytes, and the decoder drops the first space."""
    pieces = [
        "<bos>",
        "<unk>",
        "▁",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"abcdefghijklmnopqrstuvwxyz",
        "th",
        "▁t",
        "▁th",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("▁", "t"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer)


def _word_piece():
    pieces = ["<bos>", "<unk>", "the", "harvest", "##er", "##ed", "un", "x", "##1", "end", "##.", "wheat", "##,"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _wrapped(tokenizer)


TOKENIZERS = {
    "byte level": _byte_level(False),
    "byte level with a space first": _byte_level(True),
    "sentence piece": _sentence_piece(),
    "byte fallback": _byte_fallback(),
}


def groups(tokenizer, ids):
    """The tokens of each word."""
    tokens = np.asarray([ids], np.uint32)
    starts = word_starts(tokenizer, tokens, special_tokens(tokenizer, tokens))[0]
    return [part.tolist() for part in np.split(tokens[0], np.flatnonzero(starts))[1:]]


def words_of(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.decode(part).strip() for part in groups(tokenizer, ids)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_word_is_what_whitespace_separates(name, data):
    words = data.draw(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=12))
    kinds = (
        [" "] if name == "sentence piece" else [" ", "\n"]
    )  # its pieces, learnt from few lines, hold newlines inside
    gaps = data.draw(st.lists(st.sampled_from(kinds), min_size=len(words), max_size=len(words)))
    text = "".join(word + gap for word, gap in zip(words, gaps, strict=True)).strip()
    assert words_of(TOKENIZERS[name], text) == text.split()


def test_pieces_marked_inside_a_word_belong_to_it():
    assert words_of(_word_piece(), "the harvester unx1 wheat, harvested end.") == [
        *("the", "harvester", "<unk>", "wheat,", "harvested", "end.")
    ]


def test_where_every_token_is_a_word_each_is_one():
    tokenizer = make_tokenizer("gemma2")
    assert words_of(tokenizer, "w1 ... w2 w2") == ["w1", "...", "w2", "w2"]
    shipped = AutoTokenizer.from_pretrained(embedded.FOLDER)
    text = next(iter(embedded.documents(0)))
    assert words_of(shipped, text) == text.split()


def test_a_run_of_whitespace_is_a_word_for_each_token_and_its_last_opens_the_next():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("the\n\nun", add_special_tokens=False)
    text = tokenizer.batch_decode(groups(tokenizer, ids))
    assert "".join(text) == "the\n\nun"
    assert text[0] == "the"
    assert text[-1].strip() == "un"


def test_a_special_token_ends_a_word_and_the_next_starts_one():
    tokenizer = TOKENIZERS["byte level"]
    inside = tokenizer.encode("harvester", add_special_tokens=False)
    assert len(groups(tokenizer, inside)) == 1
    bos = tokenizer.bos_token_id
    assert groups(tokenizer, [bos, *inside, bos, bos, *inside]) == [[bos], inside, [bos], [bos], inside]


def test_a_window_that_begins_inside_a_word_begins_with_a_word():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode(" zyx the", add_special_tokens=False)[1:]
    assert groups(tokenizer, ids)[0][0] == ids[0]
    assert [tokenizer.decode(part) for part in groups(tokenizer, ids)][-1] == " the"


def test_windows_are_told_apart():
    tokenizer = TOKENIZERS["sentence piece"]
    rows = [tokenizer.encode(text, add_special_tokens=False)[:4] for text in ("the harvester", "un harvested the un")]
    tokens = np.asarray([row[: min(map(len, rows))] for row in rows])
    together = word_starts(tokenizer, tokens, special_tokens(tokenizer, tokens))
    alone = [word_starts(tokenizer, row[None], special_tokens(tokenizer, row[None]))[0] for row in tokens]
    assert np.array_equal(together, alone)


def test_a_token_added_later_is_known():
    tokenizer = make_tokenizer("gemma2")
    before = words_of(tokenizer, "w1 w2")
    tokenizer.add_tokens(["brandnew"])
    assert words_of(tokenizer, "w1 brandnew w2") == [before[0], "brandnew", before[1]]


def test_a_vocabulary_without_letters_works():
    words = Tokenizer(models.WordLevel({"1": 0, "2": 1}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert words_of(PreTrainedTokenizerFast(tokenizer_object=words), "1 2 1") == ["1", "2", "1"]
