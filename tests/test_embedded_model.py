"""The embedded model: its folder loads with stock classes, does what its card says, and can be made again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM
from typer.testing import CliRunner

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from harvest import embedded
from harvest.embedded import build as build_module
from harvest.embedded import training
from harvest.embedded import vocabulary as words
from harvest.embedded.card import CARD, numbers
from harvest.embedded.corpus import label
from harvest.embedded.entropy import ideal_losses
from harvest.embedded.measure import held_out, losses, probe_aucs

TOLERANCE_ACROSS_MACHINES = 0.02  # nats, as the card says


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(embedded.FOLDER)
    assert isinstance(model, GPTNeoXForCausalLM)
    return model.eval()


@pytest.fixture(scope="module")
def card() -> dict[str, tuple[float, float]]:
    return numbers(embedded.FOLDER)


def test_the_folder_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in embedded.FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", CARD} <= set(files)
    assert sum(files.values()) <= 4 * 2**20


def test_the_shipped_tokenizer_speaks_the_language() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.FOLDER)
    assert tokenizer.get_vocab() == words.TOKEN_ID
    assert tokenizer.bos_token == words.BOS
    assert tokenizer.eos_token is None
    corpus = embedded.generate(30, seed=21)
    for text, row in zip(embedded.documents(21), corpus.tokens, strict=False):
        tokens = tokenizer(text)["input_ids"]
        assert tokens == row[1:].tolist()
        assert tokenizer.decode(tokens) == text


def test_the_mask_string_is_one_ordinary_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.FOLDER)
    assert tokenizer("...")["input_ids"] == [words.TOKEN_ID["..."]]
    assert words.TOKEN_ID["..."] not in tokenizer.all_special_ids


def test_the_model_is_stock_and_matches_the_language(model: GPTNeoXForCausalLM) -> None:
    assert type(model) is GPTNeoXForCausalLM
    assert model.config.vocab_size == len(words.VOCABULARY)
    assert model.config.max_position_embeddings == embedded.WINDOW_TOKENS
    assert HookPoint.parse(embedded.HOOK_POINT).layer < model.config.num_hidden_layers
    drawn = training.input_embeddings(training.new_model(0))
    assert torch.equal(training.input_embeddings(model), drawn)  # frozen


@pytest.mark.parametrize("shifted", [False, True])
def test_the_shipped_weights_reach_the_loss_on_the_card(
    model: GPTNeoXForCausalLM, card: dict[str, tuple[float, float]], shifted: bool
) -> None:
    drafts = held_out(600, "a test", 99, shifted)
    gap = (losses(model, label(drafts).tokens) - ideal_losses(drafts)).mean(axis=1)  # [n_documents]
    error = gap.std() / np.sqrt(len(gap))
    assert gap.mean() == pytest.approx(card["loss - floor"][shifted], abs=0.002 + 4 * error)
    assert gap.mean() > 0, "better than the ideal predictor: the floor is wrong or the documents leaked"


def test_the_card_shows_what_the_language_needs(card: dict[str, tuple[float, float]]) -> None:
    for i in (0, 1):
        assert card["floor"][i] < card["loss"][i] < card["floor"][i] + 0.15
        assert card["loss - floor"][i] == pytest.approx(card["loss"][i] - card["floor"][i], abs=2e-4)
    for task in embedded.PROBE_TASKS:
        assert card[f"AUC {task.name}"][0] >= 0.95, task.name
        assert card[f"AUC {task.name}"][1] > 0.5, task.name
    assert card["spelling accuracy"][0] > 0.9
    assert card["sorting accuracy"][0] > 0.95


def _short_build(out: Path) -> dict[str, torch.Tensor]:
    build_module.build(out, n_steps=3, n_documents=64, n_test_documents=100, seed=7)
    return GPTNeoXForCausalLM.from_pretrained(out).state_dict()


def test_a_build_can_be_made_again_bit_for_bit(tmp_path: Path) -> None:
    first, second = _short_build(tmp_path / "a"), _short_build(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    cards = [(tmp_path / name / CARD).read_text() for name in "ab"]
    assert cards[0] == cards[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing left behind
    AutoTokenizer.from_pretrained(tmp_path / "a")


def test_a_short_training_lowers_the_loss_and_leaves_the_codes_alone() -> None:
    model = training.new_model(3)
    codes = training.input_embeddings(model).clone()
    steps = training.train(model, training.training_tokens(256, 3), 14, 3)
    assert np.mean(steps[-3:]) < np.mean(steps[:3]) - 0.3
    assert torch.equal(training.input_embeddings(model), codes)


def test_weights_depend_on_the_seed_and_not_on_the_global_generator() -> None:
    a = training.new_model(1)
    torch.rand(3)
    b, c = training.new_model(1), training.new_model(2)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        if x.ndim == 2:
            assert not torch.equal(x, z), name


def test_training_documents_are_half_of_each_distribution() -> None:
    tokens = training.training_tokens(10, 0)
    assert tokens.shape == (10, embedded.WINDOW_TOKENS)
    assert len({tuple(row.tolist()) for row in tokens}) == 10


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [training.learning_rate(step, 200) for step in range(200)]
    top = int(np.argmax(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(training.LEARNING_RATE)


def test_a_probe_finds_what_is_there_and_not_what_is_not() -> None:
    task = embedded.PROBE_TASKS[0]
    fit, test = embedded.generate(60, seed=31), embedded.generate(60, seed=32)
    n_values = len(embedded.VALUE_NAMES[task.attribute])
    generator = np.random.default_rng(5)

    def activations(corpus: embedded.Corpus, strength: float) -> np.ndarray:
        known = np.eye(n_values + 1)[corpus.attributes[task.attribute]]  # -1 picks the last row
        return strength * known + generator.normal(size=known.shape)

    strong = probe_aucs(task, (fit, activations(fit, 5.0)), [(test, activations(test, 5.0))])
    none = probe_aucs(task, (fit, activations(fit, 0.0)), [(test, activations(test, 0.0))])
    assert strong[0] > 0.95
    assert none[0] == pytest.approx(0.5, abs=0.1)


def test_a_folder_that_is_not_a_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a model"):
        build_module.build(tmp_path, n_steps=1, n_documents=64, n_test_documents=100, seed=0)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(embedded.FOLDER, out)
    (out / "old.txt").write_text("from an earlier build")
    _short_build(out)
    assert not (out / "old.txt").exists()
    assert numbers(out)["loss"][0] > numbers(embedded.FOLDER)["loss"][0]


@pytest.mark.parametrize("option", [["--steps", "0"], ["--documents", "10"], ["--test-documents", "5"]])
def test_sizes_that_cannot_work_are_refused(tmp_path: Path, option: list[str]) -> None:
    result = CliRunner().invoke(build_module.app, ["--out", str(tmp_path / "x"), *option])
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "x").exists()


def test_a_folder_without_a_card_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model card"):
        numbers(tmp_path)
