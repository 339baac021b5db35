"""First-letter worlds for the tests: words with planted activations, SAEs built by hand, and tokenizers with words."""

from itertools import product

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

from evaluate.rows import Rows
from evaluate.spelling import SpelledWords, Spelling
from evaluate.spelling_words import N_LETTERS, TEMPLATE
from evaluate.subject import Bench, Learned, ModelFacts, Subject
from harvest.architecture import FAMILIES, LoadedModel
from harvest.masking import special_ids
from train.activations import Threshold
from train.sae import SparseAutoencoder

N_CHILDREN = 25  # kinds of word that every letter has; one more latent adds less than 0.03 F1
D_MODEL = N_LETTERS + N_CHILDREN
STRENGTH = 3.0


def planted_words(n_each: int, seed: int) -> SpelledWords:
    """x = 3 letter + kind + noise, `n_each` words of every letter and kind."""
    letter, kind = np.array(list(product(range(N_LETTERS), range(N_CHILDREN)))).repeat(n_each, axis=0).T
    x = 0.01 * np.random.default_rng(seed).standard_normal((len(letter), D_MODEL))
    x[np.arange(len(letter)), letter] += STRENGTH
    x[np.arange(len(letter)), N_LETTERS + kind] += 1
    return SpelledWords(rows=Rows(x=torch.from_numpy(x.astype(np.float32))), letters=letter)


def planted_spelling() -> Spelling:
    """Two train words and one test word of every letter and kind."""
    return Spelling.of(planted_words(2, 1), planted_words(1, 2))


def letter_sae(n_absorbed: int) -> SparseAutoencoder:
    """A latent of every letter, then one of every word kind of every letter (on for that letter and kind, at 2).

    The first `n_absorbed` kinds silence their letter's latent and carry all of its direction.
    """
    sae = SparseAutoencoder(D_MODEL, N_LETTERS * (1 + N_CHILDREN), Threshold())
    encoder, decoder = torch.zeros(sae.d_sae, D_MODEL), torch.zeros(sae.d_sae, D_MODEL)
    for letter in range(N_LETTERS):
        encoder[letter, letter] = decoder[letter, letter] = 1
        encoder[letter, N_LETTERS : N_LETTERS + n_absorbed] = -2 * STRENGTH
        for kind in range(N_CHILDREN):
            number = N_LETTERS + letter * N_CHILDREN + kind
            encoder[number, letter], encoder[number, N_LETTERS + kind] = 1 / STRENGTH, 1
            decoder[number, N_LETTERS + kind] = 0.5
            decoder[number, letter] = STRENGTH / 2 if kind < n_absorbed else 0
    return _with_weights(sae, encoder, decoder)


def halved_sae(first_half: int) -> SparseAutoencoder:
    """Two latents of every letter: one for its first kinds of word, one for the rest."""
    sae = SparseAutoencoder(D_MODEL, 2 * N_LETTERS, Threshold())
    encoder, decoder = torch.zeros(sae.d_sae, D_MODEL), torch.zeros(sae.d_sae, D_MODEL)
    for letter in range(N_LETTERS):
        for half, kinds in enumerate((slice(first_half, N_CHILDREN), slice(0, first_half))):
            number = 2 * letter + half
            encoder[number, letter] = decoder[number, letter] = 1
            encoder[number, N_LETTERS:][kinds] = -2 * STRENGTH
    return _with_weights(sae, encoder, decoder)


def _with_weights(sae: SparseAutoencoder, encoder: torch.Tensor, decoder: torch.Tensor) -> SparseAutoencoder:
    with torch.no_grad():
        sae.W_enc.copy_(encoder.T)
        sae.W_dec.copy_(decoder)
        sae.threshold = torch.tensor(1.5)
    return sae


def spelling_subject(sae: SparseAutoencoder, spelling: Spelling, n_parameters: int = 0) -> Subject:
    dictionary = Learned(sae=sae)
    bench = Bench(
        calibration=spelling.train.rows,
        clean=spelling.test.rows,
        spelling=spelling,
        model=ModelFacts(id="planted", n_parameters=n_parameters),
    )
    return Subject(name="planted", dictionary=dictionary, raw=dictionary, bench=bench, held_out=bench.clean)


def some_words(n_each: int = 60) -> list[str]:
    """Made-up words, `n_each` of every letter; some of them twice, the second time with a capital."""
    generator = np.random.default_rng(0)
    found = []
    for first in "abcdefghijklmnopqrstuvwxyz":
        endings = generator.choice([a + b + c for a, b, c in product("aeiou", "lmnrst", "aeo")], n_each, replace=False)
        found += [first + ending for ending in endings]
    return [*found, *(word.capitalize() for word in found[:: n_each // 2])]


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are tokens with their space: "bytes" (as GPT-2 and Pythia) or "pieces" (as Llama)."""
    tokenizer = Tokenizer(models.BPE(unk_token=None if kind == "bytes" else "<unk>"))
    special = ["<|end|>"] if kind == "bytes" else ["<unk>", "<s>"]
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    letters = [TEMPLATE.format(word="of", letter=chr(ord("A") + i)) for i in range(N_LETTERS)]
    text = "".join(f"\n {line}" for line in letters) * 50 + "".join(f"\n {word} has" for word in some_words()) * 2
    tokenizer.train_from_iterator([text], trainer)
    names = {"bos_token": special[-1], "eos_token": special[-1]} | ({} if kind == "bytes" else {"unk_token": "<unk>"})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def spelling_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, knows_letters: bool = True) -> LoadedModel:
    """A random GPT-NeoX with two layers; the embedding of a token has its first letter in it, if it knows letters."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        embedding = model.get_input_embeddings().weight
        embedding.normal_(std=0.3)
    for token, number in tokenizer.get_vocab().items():
        letter = "abcdefghijklmnopqrstuvwxyz".find(token.lstrip("Ġ▁").lower()[:1] or " ")
        if knows_letters and letter >= 0:
            embedding[number, letter] += 5
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name="planted",
        revision=f"planted-{seed}-{knows_letters}",
        family="gpt_neox",
        places=FAMILIES["gpt_neox"],
        n_layers=2,
        d_model=64,
        vocab_size=len(tokenizer),
        special_ids=special_ids(tokenizer),
        max_tokens=128,
        device=model.device,
        dtype=model.dtype,
    )
