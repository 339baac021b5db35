"""Where the parts of a model are: every row of the table is proven, and what has no row is proven or refused."""

from dataclasses import replace

import pytest
import torch
from harvest_fixtures import FAMILIES as FIVE
from model_fixtures import every_point, on_the_whole_model, random_tokens, tiny_config, tiny_loaded, tiny_model
from torch import nn
from transformers import GPT2Config

from cache_spec import HookPoint, UserError
from harvest import probe
from harvest.architecture import FAMILIES, find_places, hf_name
from harvest.probe import proven_places
from harvest.reader import open_reader

WITHOUT_A_ROW = {  # where the search finds them, and whether it finds what attention and MLP add
    "bloom": ("transformer.h", "transformer.ln_f", False),  # adds inside of attention and MLP
    "codegen": ("transformer.h", "transformer.ln_f", True),
    "falcon": ("transformer.h", "transformer.ln_f", False),  # writes attention over what the MLP gave
    "glm4": ("model.layers", "model.norm", True),
    "mamba": ("backbone.layers", "backbone.norm_f", False),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm", False),
}


def proven(family):
    model = tiny_model(tiny_config(family))
    return proven_places(model, find_places(model, family), family)


def test_the_families_of_the_issue_have_rows():
    assert set(FIVE) <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_what_the_search_finds_and_the_probe_proves(family):
    """So the table and the search check each other."""
    assert proven(family) == FAMILIES[family]


@pytest.mark.parametrize("family", WITHOUT_A_ROW)
def test_a_family_without_a_row_is_found(family):
    layers, norm, has_sites = WITHOUT_A_ROW[family]
    places = proven(family)
    assert family not in FAMILIES
    assert (places.layers, places.norm, bool(places.attn_out and places.mlp_out)) == (layers, norm, has_sites)


@pytest.mark.parametrize("family", [*sorted(set(FAMILIES) - set(FIVE)), *WITHOUT_A_ROW])
def test_the_residual_stream_is_bit_equal_to_a_hook_on_the_whole_model(family):
    loaded, tokens = tiny_loaded(family), random_tokens()
    for point in every_point(sites=("resid_post",)):
        whole = on_the_whole_model(loaded.model, tokens, hf_name(loaded, point))
        with open_reader(loaded, [point]) as reader:
            assert torch.equal(reader.read(tokens)[point], whole)


@pytest.mark.parametrize("family", ["bloom", "falcon", "mamba", "opt"])
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_a_part_that_is_not_simply_added_is_refused_with_what_to_take(family, site):
    with pytest.raises(UserError, match=f"in {family} models no module .* is {site}; take resid_pre or resid_post, or"):
        hf_name(tiny_loaded(family), HookPoint(site, 1))


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_a_part_that_was_found_is_bit_equal_to_a_hook(site):
    loaded, tokens, point = tiny_loaded("codegen"), random_tokens(), HookPoint(site, 1)
    with open_reader(loaded, [point, HookPoint("resid_post", 2)]) as reader:
        assert torch.equal(reader.read(tokens)[point], on_the_whole_model(loaded.model, tokens, hf_name(loaded, point)))


def test_a_model_that_reads_in_both_directions_is_refused():
    with pytest.raises(UserError, match="'bert' is a bert model and reads its text in both directions"):
        proven("bert")


def test_no_list_of_layers_says_what_was_looked_for():
    model = tiny_model(tiny_config("opt"))
    model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match=r"one list of 5 layers and found none; one row of FAMILIES in harvest/arch"):
        find_places(model, "owner/name")


def test_two_lists_of_layers_are_both_named():
    model = tiny_model(tiny_config("opt"))
    model.add_module("others", nn.ModuleList(nn.Identity() for _ in range(3)))
    with pytest.raises(UserError, match=r"found model.decoder.layers, others; one row"):
        find_places(model, "owner/name")


def test_a_list_within_a_layer_is_no_second_list():
    model = tiny_model(tiny_config("opt"))
    model.get_submodule("model.decoder.layers.0").add_module("experts", nn.ModuleList(nn.Identity() for _ in range(3)))
    assert find_places(model, "owner/name").layers == "model.decoder.layers"


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_wrong_norm_is_refused(family):
    model = tiny_model(tiny_config(family))
    places = replace(find_places(model, family), norm="")
    with pytest.raises(UserError, match=r"the norm after them at no place, but the model cut after layer 0 does not"):
        proven_places(model, places, "owner/name")


def test_layers_that_share_a_module_are_refused():
    """A layer that runs three times has three outputs."""
    model = tiny_model(tiny_config("gpt2"))
    layers = model.get_submodule("transformer.h")
    layers._modules = dict.fromkeys("012", layers.get_submodule("0"))
    with pytest.raises(UserError, match="they do not run once each"):
        proven_places(model, FAMILIES["gpt2"], "owner/name")


def test_layers_that_write_over_what_was_read_are_refused():
    class Overwriting(nn.Module):
        def forward(self, hidden_states, *more, **named):
            return hidden_states.mul_(0.5)

    model = tiny_model(tiny_config("gpt2"))
    model.get_submodule("transformer.h")._modules["2"] = Overwriting()
    with pytest.raises(UserError, match="later layers write over what they give"):
        proven_places(model, FAMILIES["gpt2"], "owner/name")


def test_a_part_that_is_all_but_added_is_not_taken_for_one():
    """A tenth more or less is no rounding."""
    model = tiny_model(tiny_config("llama"))
    for layer in range(3):
        part = model.get_submodule(f"model.layers.{layer}.self_attn")
        part.register_forward_hook(lambda module, inputs, output: (1.3 * output[0], *output[1:]))
        model.get_submodule(f"model.layers.{layer}").register_forward_hook(lambda *seen: seen[2] * 1.3)
    places = proven_places(model, find_places(model, "llama"), "llama")
    assert (places.attn_out, places.mlp_out) == ("", "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "qwen3_moe", "gptj"])
def test_the_proof_holds_in_half_precision(family, dtype):
    model = tiny_model(tiny_config(family), dtype)
    assert proven_places(model, find_places(model, family), family) == FAMILIES[family]


def test_the_probe_leaves_no_hook_behind():
    model = tiny_model(tiny_config("gpt2"))
    proven_places(model, find_places(model, "gpt2"), "gpt2")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_the_probe_reads_few_tokens():
    """A large model on the host is proven in seconds."""
    assert probe._SHAPE[0] * probe._SHAPE[1] <= 16


@pytest.mark.parametrize("layer", [3, 99])
def test_an_unknown_layer_says_how_many_there_are(layer):
    with pytest.raises(UserError, match=rf"gpt2 has 3 layers, numbered 0 to 2; there is no layer {layer}"):
        hf_name(tiny_loaded("gpt2"), HookPoint("resid_post", layer))


def test_the_hub_name_of_every_site():
    loaded = tiny_loaded("gemma2")
    names = [hf_name(loaded, HookPoint(site, 1)) for site in ("resid_post", "resid_pre", "attn_out", "mlp_out")]
    parts = ("", ".input", ".post_attention_layernorm", ".post_feedforward_layernorm")
    assert names == [f"model.layers.1{part}" for part in parts]


def test_the_fixtures_are_as_small_as_they_say():
    config = tiny_config("gpt2")
    assert isinstance(config, GPT2Config)
    assert (config.n_layer, config.n_embd) == (3, 16)
