"""What the model card rests on: measuring, and writing down what was measured so that it can be read back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXForCausalLM

from harvest import embedded
from harvest.embedded import card as card_module
from harvest.embedded import vocabulary as words
from harvest.embedded.build import write_folder
from harvest.embedded.entropy import ideal_losses, known_distribution_losses
from harvest.embedded.grammar import write_document
from harvest.embedded.measure import Measured, accuracy, activations, held_out, losses
from harvest.embedded.training import new_model

MEASURED = Measured(
    loss=1.5,
    loss_error=0.001,
    floor=1.4,
    spelling=0.99,
    sorting=1.0,
    probe_auc={task.name: 0.97 for task in embedded.PROBE_TASKS},
)
FACTS = card_module.Facts(
    n_parameters=1000,
    n_trained_parameters=900,
    n_layers=3,
    d_model=96,
    n_steps=7,
    n_training_documents=640,
    n_test_documents=100,
    seed=5,
    in_distribution=MEASURED,
    shifted=replace(MEASURED, loss=1.75),
)


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    return new_model(4).eval()


@given(loss=st.floats(0.0, 20.0), floor=st.floats(0.0, 20.0))
@settings(max_examples=40, deadline=None)
def test_the_numbers_on_a_card_can_be_read_back(tmp_path_factory: pytest.TempPathFactory, loss: float, floor: float):
    folder = tmp_path_factory.mktemp("card")
    facts = replace(FACTS, in_distribution=replace(MEASURED, loss=loss, floor=floor))
    (folder / card_module.CARD).write_text(card_module.render(facts))
    numbers = card_module.numbers(folder)
    assert numbers["loss"] == pytest.approx((loss, 1.75), abs=1e-4)
    assert numbers["floor"] == pytest.approx((floor, 1.4), abs=1e-4)
    assert numbers["loss - floor"][0] == pytest.approx(loss - floor, abs=2e-4)
    assert {f"AUC {task.name}" for task in embedded.PROBE_TASKS} <= set(numbers)


def test_a_card_says_how_to_make_the_model_again() -> None:
    text = card_module.render(FACTS)
    assert "python -m harvest.embedded.build --steps 7 --documents 640 --seed 5" in text
    assert embedded.HOOK_POINT in text
    assert f"{len(words.VOCABULARY)} words" in text


def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, model: GPTNeoXForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "model"
    write_folder(out, model, FACTS)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", card_module.CARD} <= set(before)

    def fail(_facts: card_module.Facts) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr("harvest.embedded.build.render", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_folder(out, model, FACTS)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_losses_are_those_of_the_model_itself(model: GPTNeoXForCausalLM) -> None:
    """Against transformers' own loss: the same positions, the same shift, the same mean."""
    tokens = embedded.generate(5, seed=3).tokens
    ours = losses(model, tokens)
    assert ours.shape == (5, 63)
    batch = torch.from_numpy(tokens)
    with torch.no_grad():
        theirs = model(input_ids=batch, labels=batch).loss
    assert theirs is not None
    assert ours.mean() == pytest.approx(theirs.item(), abs=1e-5)


def test_an_untrained_model_knows_nothing(model: GPTNeoXForCausalLM) -> None:
    drafts = held_out(20, "a test", 1, False)
    loss = losses(model, np.array([draft.tokens for draft in drafts])).mean()
    assert loss == pytest.approx(np.log(len(words.VOCABULARY)), abs=0.3)
    assert loss > ideal_losses(drafts).mean() + 2.0


def test_activations_are_what_the_last_layer_hands_to_the_final_norm(model: GPTNeoXForCausalLM) -> None:
    tokens = embedded.generate(3, seed=4).tokens
    found = torch.from_numpy(activations(model, tokens))
    assert found.shape == (3, 64, model.config.hidden_size)
    with torch.no_grad():
        expected = model.gpt_neox(input_ids=torch.from_numpy(tokens)).last_hidden_state
        assert torch.allclose(model.gpt_neox.final_layer_norm(found), expected, atol=1e-5)


def test_accuracy_counts_the_right_next_words(model: GPTNeoXForCausalLM) -> None:
    corpus = embedded.generate(6, seed=5)
    with torch.no_grad():
        said = model(input_ids=torch.from_numpy(corpus.tokens)).logits.argmax(-1).numpy()
    answers = np.argwhere(corpus.positions["spelling_answer"])
    right = [said[row, position - 1] == corpus.tokens[row, position] for row, position in answers]
    assert accuracy(model, corpus, "spelling_answer") == pytest.approx(np.mean(right))


def test_held_out_documents_are_other_documents() -> None:
    a, b = (held_out(5, purpose, 0, False) for purpose in ("test", "probe"))
    assert all(x.tokens != y.tokens for x, y in zip(a, b, strict=True))
    assert [x.tokens for x in a] == [x.tokens for x in held_out(9, "test", 0, False)[:5]]


def test_not_knowing_the_distribution_costs_at_most_one_bit_a_document() -> None:
    """p_mix = (p_0 + p_1) / 2 is at least half of either, and is exactly half when the other is impossible."""
    for shifted in (False, True):
        drafts = [write_document(6, shifted, number) for number in range(200)]
        cost = ideal_losses(drafts).sum(axis=1) - known_distribution_losses(drafts).sum(axis=1)  # [n_documents]
        assert cost.max() <= np.log(2) + 1e-9
        assert cost.mean() > 0.3  # most documents do not tell at first
