"""Masking: keyed by seed, variant and window alone; special tokens are left; the mask string is one token."""

import numpy as np
import pytest
from harvest_fixtures import WORDS, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cache_spec import UserError, VariantPlan
from harvest.masking import draw_mask, mask_token, ordinary_tokens, special_tokens, window_inputs

TOKENIZER = make_tokenizer("gemma2")
MASK = mask_token(TOKENIZER, "...")
CLEAN = VariantPlan(name="clean", kind="clean")
MASKED = VariantPlan(name="masked", kind="mask", mask_prob=0.3, mask_string="...", mask_token=MASK)
RANDOM = VariantPlan(name="random", kind="random", mask_prob=0.3)
VARIANTS = (CLEAN, MASKED, RANDOM)


def some_tokens(n_windows, window_tokens, seed=0):
    """Windows of every id, special ones among them."""
    return np.random.default_rng(seed).integers(0, len(TOKENIZER), (n_windows, window_tokens)).astype(np.uint32)


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, 30), unique=True, min_size=1), seed=st.integers(0, 2**40))
def test_a_window_is_masked_alike_in_any_company(order, seed):
    tokens, order = some_tokens(31, 16), np.asarray(order)
    inputs, masks = window_inputs(TOKENIZER, VARIANTS, seed, np.arange(31), tokens)
    some_inputs, some_masks = window_inputs(TOKENIZER, VARIANTS, seed, order, tokens[order])
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


def test_masking_leaves_the_clean_tokens_as_they_were():
    tokens = some_tokens(3, 16)
    before = tokens.copy()
    window_inputs(TOKENIZER, VARIANTS, 0, np.arange(3), tokens)
    assert np.array_equal(tokens, before)


def test_special_and_ordinary_tokens_share_out_the_vocabulary():
    every = np.arange(len(TOKENIZER))
    special = every[special_tokens(TOKENIZER, every)]
    assert set(TOKENIZER.convert_ids_to_tokens(special.tolist())) == {"<bos>", "<eos>", "<unk>"}
    assert sorted([*special, *ordinary_tokens(TOKENIZER)]) == list(every)
    assert MASK in ordinary_tokens(TOKENIZER)


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


def test_with_no_similar_token_the_advice_is_general():
    words = Tokenizer(models.WordLevel({"<unk>": 0, WORDS[0]: 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="take any word that is one token"):
        mask_token(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), "...")
