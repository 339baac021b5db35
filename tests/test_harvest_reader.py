"""The cut model: the true residual stream, bit for bit, and the loaded model as it was before."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harvest_fixtures import FAMILIES
from model_fixtures import every_point, on_the_whole_model, random_tokens, tiny_config, tiny_loaded, tiny_model
from torch import Tensor, nn

from cache_spec import HookPoint, UserError
from cache_spec.hook_point import SITES
from harvest import reader as reader_module
from harvest.architecture import LoadedModel, hf_name
from harvest.model import logits
from harvest.reader import cut_model, open_reader

LAST = HookPoint("resid_post", 2)
MIDDLE = [HookPoint("resid_post", 1), HookPoint("attn_out", 1), HookPoint("mlp_out", 0), HookPoint("resid_pre", 1)]


@pytest.fixture(scope="module")
def models():
    return {family: tiny_loaded(family) for family in FAMILIES}


@pytest.fixture
def tokens():
    return random_tokens()


def read(loaded, tokens, points):
    with open_reader(loaded, points) as reader:
        return reader.read(tokens)


# ---- the cut


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_every_site_and_layer_is_bit_equal_to_a_hook_on_the_whole_model(models, tokens, family, site):
    loaded = models[family]
    for point in every_point(sites=(site,)):
        whole = on_the_whole_model(loaded.model, tokens, hf_name(loaded, point))
        assert torch.equal(read(loaded, tokens, [point])[point], whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_hook_points_in_one_pass_are_those_of_single_passes(models, tokens, family):
    together = read(models[family], tokens, every_point())
    assert list(together) == every_point()
    for point, activation in together.items():
        assert torch.equal(activation, read(models[family], tokens, [point])[point])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_hidden_state_of_the_cut_model_is_the_residual_and_not_normed(models, tokens, family):
    model, places = models[family].model, models[family].places
    normed = model.base_model(input_ids=tokens).last_hidden_state
    for layer in range(3):
        cut, _ = cut_model(model, places, layer)
        last = cut.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        assert torch.equal(last, on_the_whole_model(model, tokens, f"{places.layers}.{layer}"))
        assert not torch.allclose(last, normed, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_ends_where_the_next_begins(models, tokens, family):
    end, begin = HookPoint("resid_post", 0), HookPoint("resid_pre", 1)
    found = read(models[family], tokens, [begin, end])
    assert torch.equal(found[end], found[begin])


def test_layers_after_the_last_wanted_one_and_the_norm_do_not_run(tokens):
    loaded, calls = tiny_loaded("gpt_neox"), []
    for path in ("gpt_neox.layers.0", "gpt_neox.layers.1", "gpt_neox.layers.2", "gpt_neox.final_layer_norm"):
        loaded.model.get_submodule(path).register_forward_hook(lambda *seen, path=path: calls.append(path[-1]))
    read(loaded, tokens, [HookPoint("resid_post", 1), HookPoint("mlp_out", 0)])
    assert calls == ["0", "1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loaded_model_stays_as_it_was(models, tokens, family):
    loaded = models[family]
    before, parts = logits(loaded, tokens), dict(loaded.model.named_modules())
    with open_reader(loaded, every_point(2)) as reader, open_reader(loaded, [LAST]) as other:
        reader.read(tokens)
        assert torch.equal(logits(loaded, tokens), before)
        assert torch.equal(other.read(tokens)[LAST], on_the_whole_model(loaded.model, tokens, hf_name(loaded, LAST)))
    after = dict(loaded.model.named_modules())
    assert list(after) == list(parts)
    assert all(after[path] is part for path, part in parts.items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in after.values())


def test_the_cut_model_has_no_weights_of_its_own(models):
    for loaded in models.values():
        cut, _ = cut_model(loaded.model, loaded.places, 1)
        of_the_whole = {weight.data_ptr() for weight in loaded.model.parameters()}
        assert {weight.data_ptr() for weight in cut.parameters()} < of_the_whole


def test_a_reader_does_not_hold_on_to_the_last_batch(models, tokens):
    with open_reader(models["gpt2"], [LAST]) as reader:
        activation = weakref.ref(reader.read(tokens)[LAST])
        gc.collect()
        assert activation() is None


def test_activations_come_without_gradients_and_may_enter_autograd(models, tokens):
    weight = torch.ones(16, requires_grad=True)
    (read(models["gpt2"], tokens, [LAST])[LAST] * weight).sum().backward()
    assert weight.grad is not None
    with torch.inference_mode():
        assert torch.equal(read(models["gpt2"], tokens, [LAST])[LAST], read(models["gpt2"], tokens, [LAST])[LAST])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_read_as_it_is(tokens, family, dtype):
    loaded = tiny_loaded(family, dtype=dtype)
    found = read(loaded, tokens, MIDDLE)
    for point in MIDDLE:
        assert found[point].dtype == dtype
        assert torch.equal(found[point], on_the_whole_model(loaded.model, tokens, hf_name(loaded, point)))


def test_a_layer_the_model_lacks_is_refused(models):
    with pytest.raises(UserError, match="there is no layer 3"), open_reader(models["llama"], [HookPoint("mlp_out", 3)]):
        pass


def test_an_input_given_by_name_is_seen_and_replaced():
    class Named(nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1

    whole, seen = nn.Sequential(Named()), []

    def see(x):
        seen.append(x)
        return 2 * x

    handle = reader_module.add_hook(whole.get_submodule, "0.input", see)
    assert torch.equal(whole[0](hidden_states=torch.ones(2)), torch.full((2,), 3.0))
    assert torch.equal(whole[0](torch.ones(2)), torch.full((2,), 3.0))
    handle.remove()
    assert torch.equal(whole[0](torch.ones(2)), torch.full((2,), 2.0))
    assert len(seen) == 2


# ---- reading on from kept keys and values


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_with_keys_kept_changes_no_bit(family, tokens):
    loaded = unlimited(family)
    with open_reader(loaded, MIDDLE) as reader:
        plain, (kept, _) = reader.read(tokens), reader.read_kept(tokens)
    for point in MIDDLE:
        assert torch.equal(kept[point], plain[point])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [1, 7, 31])
def test_reading_on_is_reading_the_whole_window_up_to_rounding(family, tokens, start):
    """Also for GPT-2, whose positions are learned: the rest of a window keeps its places."""
    rows = torch.tensor([2, 0, 2])
    others = torch.cat([tokens[rows, :start], random_tokens(3, 32 - start, seed=9)], dim=1)
    with open_reader(unlimited(family), MIDDLE) as reader:
        _, kept = reader.read_kept(tokens)
        whole = reader.read(others)
        for _ in range(2):  # what is kept stays usable
            rest = reader.read_after(kept, rows, start, others[:, start:])
            for point in MIDDLE:
                assert rest[point].shape == (3, 32 - start, 16)
                torch.testing.assert_close(rest[point], whole[point][:, start:], rtol=1e-5, atol=1e-5)


def test_reading_on_depends_on_what_was_kept(tokens):
    """Or the test above could not fail."""
    with open_reader(unlimited("gpt_neox"), MIDDLE) as reader:
        _, kept = reader.read_kept(tokens)
        one, other = (reader.read_after(kept, torch.tensor([row]), 7, tokens[:1, 7:])[MIDDLE[0]] for row in (0, 1))
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliding_window_shorter_than_the_text_cannot_be_continued(family):
    """The fixtures' Gemma-2 looks back 8 tokens in every other layer."""
    with open_reader(tiny_loaded(family), MIDDLE) as reader:
        assert [reader.can_continue(n) for n in (8, 9, 32)] == [True, family != "gemma2", family != "gemma2"]


def test_a_family_the_tests_do_not_know_is_not_continued():
    with open_reader(tiny_loaded("mamba"), [LAST]) as reader:
        assert not reader.can_continue(2)


def unlimited(family: str) -> LoadedModel:
    """A model whose attention sees the whole window."""
    if family != "gemma2":
        return tiny_loaded(family)
    config = tiny_config("gemma2", sliding_window=64, query_pre_attn_scalar=8)
    return tiny_loaded("gemma2", tiny_model(config))


# ---- compile


@pytest.fixture
def compiled_parts(monkeypatch) -> list[str]:
    """torch.compile with a back end that costs nothing; lists what was compiled."""
    real, parts = torch.compile, []

    def compile(forward: Any, **options: Any) -> Callable:
        parts.append(type(forward.__self__).__name__)
        assert options == {"dynamic": False}
        return real(forward, backend="eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile)
    return parts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_reads_the_same_at_every_site(models, tokens, compiled_parts, family):
    """A hook inside a layer must not be lost because an earlier layer of the same kind had none."""
    points = [HookPoint("resid_pre", 0), LAST, HookPoint("attn_out", 1), HookPoint("mlp_out", 1)]
    plain = read(models[family], tokens, points)
    with open_reader(models[family], points, compile=True) as reader:
        assert not reader.can_continue(8)
        for _ in range(2):
            found = reader.read(tokens)
            for point in points:
                torch.testing.assert_close(found[point], plain[point], rtol=1e-4, atol=1e-4)
    assert compiled_parts.count(compiled_parts[0]) == 2  # layers 0 and 2; of layer 1, its parts
    assert torch.equal(logits(models[family], tokens), logits(tiny_loaded(family), tokens))


def test_layers_of_one_kind_are_compiled_once(models, tokens, monkeypatch):
    graphs: list[Any] = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda forward, **options: real(forward, backend=count, **options))
    with open_reader(models["llama"], [LAST], compile=True) as reader:
        reader.read(tokens)
        reader.read(tokens)
        assert len(graphs) == 1
        reader.read(tokens[:2])  # shapes are static
        assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, when first imported
def test_real_compilation_changes_no_more_than_rounding():
    torch._dynamo.reset()
    loaded, tokens, points = tiny_loaded("llama"), random_tokens(2, 8), [HookPoint("resid_post", 0)]
    plain = read(loaded, tokens, points)
    with open_reader(loaded, points, compile=True) as reader:
        torch.testing.assert_close(reader.read(tokens), plain, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_compiling_is_a_sentence(models, tokens, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda forward, **options: real(forward, backend=broken, **options))
    with (
        open_reader(models["llama"], [LAST], compile=True) as reader,
        pytest.raises(UserError, match=r"torch.compile failed .*No working C\+\+ .*; it needs .* leave --compile out"),
    ):
        reader.read(tokens)


def test_tokens_may_be_of_any_width(models, tokens):
    found: Tensor = read(models["qwen3"], tokens.int(), [LAST])[LAST]
    assert torch.equal(found, read(models["qwen3"], tokens, [LAST])[LAST])
