"""Masking: keyed by seed, variant and window alone; special tokens are left; the mask string is one token."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from harvest_fixtures import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cache_spec import UserError, VariantPlan
from harvest.masking import draw_mask, draw_word_mask, mask_token, ordinary_tokens, special_tokens, window_inputs

TOKENIZER = make_tokenizer("gemma2")
MASK = mask_token(TOKENIZER, "...")
CLEAN = VariantPlan(name="clean", kind="clean")
MASKED = VariantPlan(name="masked", kind="mask", mask_prob=0.3, mask_string="...", mask_token=MASK)
RANDOM = VariantPlan(name="random", kind="random", mask_prob=0.3)
MASKED_WORDS = replace(MASKED, name="masked_1", kind="mask_word")
VARIANTS = (CLEAN, MASKED, RANDOM)
ALL_KINDS = (*VARIANTS, MASKED_WORDS)
OLD_DRAWS = ("32358ab21c953d1e", "16f893d52953fea4")  # (masks, inputs) of the first granary


def some_tokens(n_windows, window_tokens, seed=0):
    """Windows of every id, special ones among them."""
    return np.random.default_rng(seed).integers(0, len(TOKENIZER), (n_windows, window_tokens)).astype(np.uint32)


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, 30), unique=True, min_size=1), seed=st.integers(0, 2**40))
def test_a_window_is_masked_alike_in_any_company(order, seed):
    tokens, order = some_tokens(31, 16), np.asarray(order)
    inputs, masks = window_inputs(TOKENIZER, ALL_KINDS, seed, np.arange(31), tokens)
    some_inputs, some_masks = window_inputs(TOKENIZER, ALL_KINDS, seed, order, tokens[order])
    assert np.array_equal(some_inputs, inputs[:, order])
    assert np.array_equal(some_masks, masks[:, order])


def test_a_mask_depends_on_seed_variant_and_window_and_on_nothing_else():
    special = np.zeros(256, bool)
    draws = [
        draw_mask(seed, name, window, special, 0.5)
        for seed in (0, 1)
        for name in ("masked", "masked_1")
        for window in (0, 1)
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)
    assert np.array_equal(draw_mask(0, "masked", 7, special, 0.5), draw_mask(0, "masked", 7, special, 0.5))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_each_ordinary_token_is_replaced_with_the_given_probability_and_no_special_one_ever(p):
    special = np.random.default_rng(0).random(400) < 0.2
    draws = np.stack([draw_mask(3, "masked", window, special, p) for window in range(200)])
    assert not draws[:, special].any()
    n = draws[:, ~special].size
    assert abs(draws[:, ~special].mean() - p) <= 5 * np.sqrt(p * (1 - p) / n)


def test_masks_of_neighbouring_tokens_are_independent():
    draws = np.stack([draw_mask(0, "masked", window, np.zeros(512, bool), 0.3) for window in range(100)])
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.02


def test_a_higher_probability_masks_more_of_the_same_tokens():
    """Then a sweep over p compares nested masks, not different ones."""
    special = np.zeros(512, bool)
    low, high = (draw_mask(0, "masked", 5, special, p) for p in (0.1, 0.4))
    assert high[low].all()
    assert high.sum() > low.sum()


def test_what_is_not_replaced_stays_and_what_is_becomes_the_mask_token_or_a_random_one():
    tokens = some_tokens(50, 64)
    (clean, masked, random), masks = window_inputs(TOKENIZER, VARIANTS, 0, np.arange(50), tokens)
    assert np.array_equal(clean, tokens)
    assert not masks[0].any()
    assert (masked[masks[1]] == MASK).all()
    assert np.array_equal(masked[~masks[1]], tokens[~masks[1]])
    assert np.array_equal(random[~masks[2]], tokens[~masks[2]])
    assert np.isin(random[masks[2]], ordinary_tokens(TOKENIZER)).all()
    assert len(np.unique(random[masks[2]])) == len(ordinary_tokens(TOKENIZER))
    assert not np.array_equal(masks[1], masks[2])


def test_the_draws_of_tokens_and_random_ones_are_those_of_older_caches():
    """A cache that was begun before must go on with the masks that it has."""
    tokens = some_tokens(20, 64)
    inputs, masks = window_inputs(TOKENIZER, VARIANTS, 7, np.arange(20), tokens)
    assert (
        hashlib.sha256(masks.tobytes()).hexdigest()[:16],
        hashlib.sha256(inputs.tobytes()).hexdigest()[:16],
    ) == OLD_DRAWS


def words(n_windows, window_tokens, longest=6, seed=0):
    """Where words start: the first token and then every 1 to `longest` tokens."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, (n_windows, window_tokens))
    starts = np.zeros((n_windows, window_tokens), bool)
    for row, length in zip(starts, lengths, strict=True):
        row[[0, *(end for end in np.cumsum(length) if end < window_tokens)]] = True
    return starts


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), p=st.floats(0, 1), special_share=st.sampled_from([0.0, 0.2]))
def test_a_word_is_replaced_whole_or_not_at_all(seed, p, special_share):
    special = np.random.default_rng(seed).random(80) < special_share
    starts = words(1, 80, seed=seed)[0] | special
    starts[1:] |= special[:-1]
    mask = draw_word_mask(seed, "masked", 3, special, starts, p)
    assert not mask[special].any()
    for word in np.split(mask, np.flatnonzero(starts)):
        assert len(np.unique(word)) <= 1


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_words_long_and_short_are_replaced_with_the_given_probability(p):
    starts, none = words(300, 256), np.zeros(256, bool)
    masks = np.stack([draw_word_mask(5, "masked", i, none, row, p) for i, row in enumerate(starts)])
    n_words = starts.sum()
    assert abs(masks[starts].mean() - p) <= 5 * np.sqrt(p * (1 - p) / n_words)
    assert abs(masks.mean() - p) <= 10 * np.sqrt(p * (1 - p) / n_words)  # of the tokens too: a word's length has no say


def test_masks_of_words_are_drawn_anew_for_each_variant_and_nested_in_the_probability():
    starts, none = np.ones(4096, bool), np.zeros(4096, bool)
    one, other = (draw_word_mask(0, name, 0, none, starts, 0.3) for name in ("masked", "masked_1"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.08
    assert abs(np.corrcoef(one, draw_mask(0, "masked", 0, none, 0.3))[0, 1]) < 0.08
    assert draw_word_mask(0, "masked", 0, none, starts, 0.5)[one].all()


def test_masked_words_become_the_mask_token_one_for_one():
    tokens = some_tokens(50, 64)
    (inputs,), (mask,) = window_inputs(TOKENIZER, [MASKED_WORDS], 0, np.arange(50), tokens)
    assert 0.2 < mask.mean() < 0.4
    assert (inputs[mask] == MASK).all()
    assert np.array_equal(inputs[~mask], tokens[~mask])
    assert not mask[special_tokens(TOKENIZER, tokens)].any()


def test_masking_leaves_the_clean_tokens_as_they_were():
    tokens = some_tokens(3, 16)
    before = tokens.copy()
    window_inputs(TOKENIZER, ALL_KINDS, 0, np.arange(3), tokens)
    assert np.array_equal(tokens, before)


def test_special_and_ordinary_tokens_share_out_the_vocabulary():
    every = np.arange(len(TOKENIZER))
    special = every[special_tokens(TOKENIZER, every)]
    assert set(TOKENIZER.convert_ids_to_tokens(special.tolist())) == {"<bos>", "<eos>", "<unk>"}
    assert sorted([*special, *ordinary_tokens(TOKENIZER)]) == list(every)
    assert MASK in ordinary_tokens(TOKENIZER)


def test_what_was_added_as_special_is_special_and_no_ordinary_token():
    """Like the marks of a chat, which `all_special_ids` does not list."""
    tokenizer = make_tokenizer("gpt_neox")
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.add_tokens(["plain"])
    turn, plain = (tokenizer.convert_tokens_to_ids(token) for token in ("<|turn|>", "plain"))
    assert special_tokens(tokenizer, np.array([turn, plain])).tolist() == [True, False]
    assert turn not in ordinary_tokens(tokenizer)
    assert plain in ordinary_tokens(tokenizer)
    _, masks = window_inputs(tokenizer, ALL_KINDS, 0, np.arange(4), np.full((4, 16), turn))
    assert not masks.any()


def test_a_mask_string_of_one_token_is_found():
    assert TOKENIZER.convert_tokens_to_ids("...") == MASK
    assert mask_token(TOKENIZER, "w7") == TOKENIZER.convert_tokens_to_ids("w7")


@pytest.mark.parametrize(
    ("text", "found"),
    [("w1 w2", "is 2 tokens"), ("....", "not in its vocabulary"), ("", "is 0 tokens"), (" ", "is 0 tokens")],
)
def test_any_other_mask_string_is_refused_with_ones_that_work(text, found):
    with pytest.raises(UserError, match=found) as caught:
        mask_token(TOKENIZER, text)
    named = str(caught.value).split("these are one: ")[1].split(", ")
    assert "'...'" in named
    assert all(mask_token(TOKENIZER, text.strip("'")) >= 0 for text in named)


def test_a_mask_string_that_starts_like_a_token_names_that_token():
    with pytest.raises(UserError, match="these are one: 'w1'"):
        mask_token(TOKENIZER, "w1!?")


@pytest.mark.parametrize(("others", "advice"), [(["w1", "w2"], "these are one: 'w1', 'w2'$"), ([], "take any word")])
def test_with_no_similar_token_some_words_are_named_and_without_any_the_advice_is_general(others, advice):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *others])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=advice):
        mask_token(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), "...")


def byte_level():
    """As GPT-2's: a space belongs to the token behind it, so that '...' and ' ...' are two tokens, or one and none."""
    text = ["wait ... and see... the end..."] * 20 + [f"w{i} is" for i in range(30)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def spaces_only():
    """A SentencePiece vocabulary in which dots are a token behind a space and nowhere else."""
    pieces = [("<unk>", 0.0), ("\u2581...", -1.0), ("\u2581", -2.0), ("a", -3.0), ("\u2581a", -2.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, spaces_only])
@pytest.mark.parametrize("text", ["....,", "wait and see", "a?!", " a a", "q" * 30, "\u6578\u64da"])
def test_the_strings_named_instead_are_one_token_each(make, text):
    tokenizer = make()
    with pytest.raises(UserError) as caught:
        mask_token(tokenizer, text)
    named = re.findall(r"'((?:[^'\\])*)'", str(caught.value).split("these are one: ")[1])
    assert named
    for other in named:
        ids = tokenizer.encode(other, add_special_tokens=False)
        assert ids == [mask_token(tokenizer, other)]


def test_dots_with_and_without_a_space_are_two_tokens_of_a_byte_level_vocabulary():
    tokenizer = byte_level()
    bare, spaced = mask_token(tokenizer, "..."), mask_token(tokenizer, " ...")
    assert bare != spaced
    assert (tokenizer.decode([bare]), tokenizer.decode([spaced])) == ("...", " ...")
