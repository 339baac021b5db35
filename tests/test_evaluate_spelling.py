"""Spelling prompts: the right words, the right places, the plain fit's probes, and reasons where they fail."""

import numpy as np
import pytest
import torch
from harvest_fixtures import make_tokenizer
from spelling_fixtures import planted_words, some_words, spelling_model, trained_tokenizer

from cache_spec.hook_point import HookPoint
from evaluate.probes import Standard, f1_score, fit_dense, one_hot
from evaluate.rows import Rows
from evaluate.spelling import SpelledWords, Spelling, fit_probes, make_spelling, write_prompts
from evaluate.spelling_words import N_LETTERS, Words, even_draw, split, vocabulary_words
from evaluate.store import Store
from harvest.model import activations, load_model

POINT = HookPoint("resid_post", 0)
N_WORDS = 1560  # twelve test words of every letter


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def loaded(request):
    return spelling_model(trained_tokenizer(request.param))


def test_words_are_single_tokens_with_their_space_once_for_any_case(loaded):
    known = vocabulary_words(loaded.tokenizer, loaded.special_ids, loaded.vocab_size)
    assert {word.lower() for word in some_words()} <= {word.lower() for word in known.words}
    assert len({word.lower() for word in known.words}) == len(known.words)
    for number, word, letter in zip(known.ids, known.words, known.letters, strict=True):
        assert word.isascii()
        assert word.isalpha()
        assert ord(word[0].lower()) - ord("a") == letter
        assert loaded.tokenizer(f"\n {word} has", add_special_tokens=False)["input_ids"].count(number) >= 1
    assert "has" in known.words
    assert not set(known.ids) & set(loaded.special_ids)


def test_a_vocabulary_longer_than_the_model_is_cut(loaded):
    known = vocabulary_words(loaded.tokenizer, loaded.special_ids, 1000)
    assert len(known.ids)
    assert known.ids.max() < 1000


def test_the_activation_is_that_of_the_words_own_token_in_the_full_prompt(loaded):
    asked, reason = write_prompts(loaded, 3, N_WORDS)
    assert asked is not None, reason
    spelling, reason = make_spelling(loaded, POINT, store=Store(None), seed=3, n_words=N_WORDS)
    assert spelling is not None, reason
    assert len(spelling.letters) == N_LETTERS
    for part, words in zip(asked, (spelling.train, spelling.test), strict=True):
        for i in (0, len(words.letters) - 1):
            prompt = part.tokens[i, : part.last[i] + 1]
            text = loaded.tokenizer.decode(prompt[1:])
            assert text.count(" has the first letter: ") == 10
            assert text.endswith(f"\n {part.words.words[i]}")
            assert all(line.split()[0][0].upper() == line[-1] for line in text.split("\n")[:-1])
            rest = loaded.tokenizer(f"\n {part.words.words[i]} has the first letter:", add_special_tokens=False)
            question = rest["input_ids"][rest["input_ids"].index(prompt[-1]) + 1 :]
            assert len(question) == 5 or loaded.tokenizer.unk_token_id is not None  # upstream's place is then -6
            full = torch.tensor([[*prompt, *question]])
            expected = activations(loaded, full, [POINT])[POINT][0, part.last[i]]
            torch.testing.assert_close(words.rows.x[i], expected, atol=1e-5, rtol=1e-4)


def test_examples_are_train_words_and_never_the_word_itself(loaded):
    asked, _ = write_prompts(loaded, 0, N_WORDS)
    assert asked is not None
    train, test = asked
    sentence = set(loaded.tokenizer("\n of has the first letter", add_special_tokens=False)["input_ids"])
    tested = np.array(sorted(set(test.words.ids) - sentence))
    assert not set(train.words.ids) & set(tested)
    for part in asked:
        for tokens, last, number in zip(part.tokens, part.last, part.words.ids, strict=True):
            assert tokens[last] == number
            assert number not in tokens[:last] or number in sentence
            assert not np.isin(tokens[:last], tested).any()
            assert tokens[0] == loaded.tokenizer.bos_token_id


def test_the_same_seed_gives_the_same_words_and_another_others(loaded):
    first, again, other = (write_prompts(loaded, seed, N_WORDS)[0] for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    assert first[0].words.words != other[0].words.words


def test_the_model_runs_once_and_is_read_from_the_store_after(tmp_path):
    loaded = spelling_model(trained_tokenizer("bytes"))
    first, _ = make_spelling(loaded, POINT, store=Store(tmp_path), seed=0, n_words=N_WORDS)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.fill_(torch.nan)  # a second run of the model would show
    again, _ = make_spelling(loaded, POINT, store=Store(tmp_path), seed=0, n_words=N_WORDS)
    assert first is not None
    assert again is not None
    assert torch.equal(first.test.rows.x, again.test.rows.x)
    assert torch.equal(first.directions, again.directions)


def test_draws_are_even_and_every_letter_is_split_alike():
    generator = np.random.default_rng(0)
    letters = np.repeat(np.arange(N_LETTERS), [5] * 6 + [100] * 20)
    words = Words(ids=np.arange(len(letters)), letters=letters, words=("word",) * len(letters))
    drawn = even_draw(words, 1030, generator)
    assert np.bincount(drawn.letters).tolist() == [5] * 6 + [50] * 20
    train, test = split(drawn, generator)
    assert np.bincount(test.letters).tolist() == [1] * 6 + [10] * 20
    assert sorted([*train.ids, *test.ids]) == sorted(drawn.ids)


def test_a_model_whose_tokenizer_has_no_sentence_for_it_gives_a_reason():
    embedded = load_model("tiny")
    spelling, reason = make_spelling(embedded, POINT, store=Store(None), seed=0)
    assert spelling is None
    assert "no tokens for '... has the first letter: A'" in reason or "needs 200" in reason


def test_a_small_vocabulary_gives_a_reason():
    loaded = spelling_model(make_tokenizer("gpt_neox"))
    assert make_spelling(loaded, POINT, store=Store(None), seed=0) == (
        None,
        "the vocabulary of planted has 0 tokens that are one word of ASCII letters, and "
        "the first-letter task needs 200",
    )


def test_a_model_that_does_not_know_letters_gives_a_reason():
    loaded = spelling_model(trained_tokenizer("bytes"), knows_letters=False)
    spelling, reason = make_spelling(loaded, POINT, store=Store(None), seed=0, n_words=N_WORDS)
    assert spelling is None
    assert reason.startswith("at resid_post.0 of planted 0 of 26 letters can be read off")


def noisy_words(n: int, seed: int, d_model: int = 40) -> SpelledWords:
    basis = np.random.default_rng(0).standard_normal((N_LETTERS, d_model))
    letters = np.arange(n) % N_LETTERS
    x = 0.6 * basis[letters] + np.random.default_rng(seed).standard_normal((n, d_model)) + 3
    return SpelledWords(rows=Rows(x=torch.from_numpy(x.astype(np.float32))), letters=letters)


def test_the_probes_are_those_of_the_plain_fit():
    words = noisy_words(520, 1)
    standard = Standard.of(words.rows.x)
    labels = torch.from_numpy(one_hot(words.letters, np.arange(N_LETTERS)))
    plain = fit_dense(standard.apply(words.rows.x), labels)
    weights = fit_probes(words)
    torch.testing.assert_close(weights[:, :-1] * standard.std, plain[:, :-1], atol=2e-2, rtol=2e-2)


def test_the_probes_are_no_worse_than_upstreams_adam():
    train, test = noisy_words(1040, 1), noisy_words(520, 2)
    on = one_hot(test.letters, np.arange(N_LETTERS))
    x, y = train.rows.x, torch.from_numpy(one_hot(train.letters, np.arange(N_LETTERS)).T.astype(np.float32))
    weights, bias = torch.zeros(N_LETTERS, 40, requires_grad=True), torch.zeros(N_LETTERS, requires_grad=True)
    adam, generator = torch.optim.Adam([weights, bias], lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(50):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            adam.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(
                x[batch] @ weights.T + bias, y[batch], pos_weight=torch.full((N_LETTERS,), 25.0)
            ).backward()
            adam.step()
    upstream = f1_score(((test.rows.x @ weights.T + bias) > 0).T.numpy(), on).mean()
    ours = fit_probes(train)
    found = f1_score((ours[:, :-1] @ test.rows.x.double().T + ours[:, -1:] > 0).numpy(), on).mean()
    assert found >= upstream - 0.01


def test_a_letter_without_words_or_with_few_is_left_out():
    train, test = planted_words(2, 1), planted_words(1, 2)
    some = train.letters != 7
    fewer = (test.letters != 9) | (np.arange(len(test.letters)) % 3 == 0)
    spelling = Spelling.of(
        SpelledWords(rows=Rows(x=train.rows.x[some]), letters=train.letters[some]),
        SpelledWords(rows=Rows(x=test.rows.x[fewer]), letters=test.letters[fewer]),
    )
    assert sorted(set(range(N_LETTERS)) - set(spelling.letters)) == [7, 9]
    assert spelling.right.sum(1).tolist() == [25] * 24
