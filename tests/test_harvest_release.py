"""What `release_rest` leaves: the layers that are read, on the device, and nothing else in memory."""

import gc
import weakref
from typing import Any

import pytest
import torch
from harvest_fixtures import FAMILIES
from model_fixtures import random_tokens, tiny_config, tiny_loaded, tiny_model
from torch import nn

from cache_spec import HookPoint, UserError
from harvest.model import logits
from harvest.reader import open_reader, release_rest

MIDDLE = [HookPoint("resid_post", 1), HookPoint("attn_out", 1), HookPoint("mlp_out", 0), HookPoint("resid_pre", 1)]


@pytest.fixture
def tokens():
    return random_tokens()


def read(loaded, tokens, points):
    with open_reader(loaded, points) as reader:
        return reader.read(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_after_release_reads_the_same_and_the_rest_is_gone(tokens, family):
    loaded = tiny_loaded(family)
    layers: Any = loaded.model.get_submodule(loaded.places.layers)
    rest = [weakref.ref(weight) for weight in layers[2].parameters()]
    rest += [weakref.ref(weight) for weight in loaded.model.get_submodule(loaded.places.norm).parameters()]
    kept = [weakref.ref(weight) for weight in layers[1].parameters()]
    plain = read(loaded, tokens, MIDDLE)
    small = release_rest(loaded, MIDDLE)
    gc.collect()
    assert rest
    assert not any(weight() is not None for weight in rest)
    assert all(weight() is not None for weight in kept)
    assert (small.n_layers, small.is_whole) == (3, False)
    found = read(small, tokens, MIDDLE)
    assert all(torch.equal(found[point], plain[point]) for point in MIDDLE)


def n_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_goes_and_tied_embeddings_stay(tokens, tied):
    loaded = tiny_loaded("llama", tiny_model(tiny_config("llama", tie_word_embeddings=tied)))
    head: Any = loaded.model.get_output_embeddings()
    embedding: Any = loaded.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    goes, stays, plain = weakref.ref(head), weakref.ref(embedding.weight), read(loaded, tokens, MIDDLE)
    small = release_rest(loaded, MIDDLE)
    del head
    gc.collect()
    assert goes() is None
    assert stays() is embedding.weight
    layers = [small.model.get_submodule(f"model.layers.{i}") for i in range(2)]
    assert n_weights(small.model) == n_weights(embedding) + sum(map(n_weights, layers))
    assert torch.equal(read(small, tokens, MIDDLE)[MIDDLE[0]], plain[MIDDLE[0]])


def test_a_released_model_gives_no_logits(tokens):
    with pytest.raises(AssertionError, match="dropped"):
        logits(release_rest(tiny_loaded("gpt2"), MIDDLE), tokens)


def test_only_what_is_left_is_moved_to_the_device(monkeypatch):
    moved = []

    def to(model: nn.Module, device: torch.device) -> None:
        moved.append((n_weights(model), device))

    loaded = tiny_loaded("gpt2")
    before = n_weights(loaded.model)
    monkeypatch.setattr(type(loaded.model), "to", to)
    small = release_rest(loaded, [HookPoint("resid_post", 0)])
    assert moved == [(n_weights(small.model), loaded.device)]
    assert n_weights(small.model) < before / 2


def test_weights_that_do_not_fit_are_a_sentence(monkeypatch):
    def to(model: nn.Module, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no room")

    loaded = tiny_loaded("gpt2")
    monkeypatch.setattr(type(loaded.model), "to", to)
    with pytest.raises(UserError, match=r"GiB of weights of gpt2 do not fit on cpu; .* --dtype bfloat16"):
        release_rest(loaded, MIDDLE)


def test_an_unknown_layer_releases_nothing(tokens):
    loaded = tiny_loaded("gpt2")
    with pytest.raises(UserError, match="there is no layer 7"):
        release_rest(loaded, [HookPoint("resid_post", 7)])
    assert logits(loaded, tokens).shape == (4, 32, 64)
