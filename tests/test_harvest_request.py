"""Options: each is checked before the model is loaded where it can be, and completed with the model's defaults."""

import dataclasses
import inspect

import pytest
from harvest_fixtures import make_tokenizer, options, save_model
from hypothesis import given
from hypothesis import strategies as st

from cache_spec import HookPoint, UserError
from harvest.model import load_model
from harvest.options import Options, check_options, parse_layers, parse_probabilities
from harvest.request import make_request


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model"))))


BEFORE_THE_MODEL = [
    ({"layers": "middle"}, "'middle' is not a hook point"),
    ({"layers": "1,,2"}, "'' is not a hook point"),
    ({"mask_prob": 1.5}, "--mask-prob is 1.5, and a probability must be from 0 to 1"),
    ({"mask_prob": -0.1}, "--mask-prob is -0.1"),
    ({"mask_prob": float("nan")}, "--mask-prob is nan"),
    ({"mask_prob": ""}, "--mask-prob is ''; give a probability such as 0.3, several such as 0.1,0.3,0.5, or 0"),
    ({"mask_prob": "often"}, "--mask-prob is 'often'"),
    ({"mask_prob": "0.3;0.5"}, "--mask-prob is '0.3;0.5'"),
    ({"mask_prob": "0.3,"}, "--mask-prob is '0.3,'"),
    ({"mask_prob": "0.3,1.5"}, "--mask-prob is 0.3,1.5, and a probability must be from 0 to 1"),
    ({"mask_prob": "0.3,0.30"}, "--mask-prob is 0.3,0.30, which names a probability twice"),
    ({"mask_prob": "0,0.3"}, "--mask-prob is 0,0.3; leave out the 0, the clean variant is always there"),
    ({"random_prob": 2.0}, "--random-prob is 2.0"),
    ({"random_prob": "0.1,0.1"}, "--random-prob is 0.1,0.1, which names a probability twice"),
    (
        {"mask_prob": "0.1,0.2,0.3,0.4,0.5,0.6,0.7", "random_prob": "0.1,0.2"},
        "name 9 variants beside the clean one, and a cache holds 8",
    ),
    ({"mask_unit": "sentence"}, "--mask-unit is 'sentence'; give token or word"),
    ({"context": 1}, "--context is 1; give 2 to 65,535 tokens"),
    ({"context": -5}, "--context is -5"),
    ({"context": 70_000}, "--context is 70000"),
    ({"held_out": 0.6}, "--held-out is 0.6"),
    ({"held_out": -0.1}, "--held-out is -0.1"),
    ({"held_out": float("nan")}, "--held-out is nan"),
    ({"scale_factor": 3.0}, "--scale-factor is 3"),
    ({"scale_factor": -2.0}, "--scale-factor is -2"),
    ({"scale_factor": float("inf")}, "--scale-factor is inf"),
    ({"scale_factor": float("nan")}, "--scale-factor is nan"),
    ({"scale_factor": "resid_post.1=5"}, "--scale-factor is resid_post.1=5; give a power of two"),
    ({"scale_factor": "many"}, "--scale-factor is many"),
    ({"tokens": "lots"}, "--tokens is 'lots'"),
    ({"tokens": "-1"}, "--tokens is '-1'"),
]
WITH_THE_MODEL = [
    ({"layers": "3"}, "3 layers, numbered 0 to 2; there is no layer 3"),
    ({"layers": "0,mlp_out.7"}, "there is no layer 7"),
    ({"layers": ""}, "--layers is missing, .* 3 layers, numbered 0 to 2"),
    ({"mask_string": "w1 w2"}, "--mask-string 'w1 w2' must be one token .* 2 tokens; these are one: .*'w1'"),
    ({"mask_string": ""}, "--mask-string '' must be one token"),
    ({"scale_factor": "resid_post.2=4"}, "--scale-factor names resid_post.2, which --layers does not"),
    ({"context": 65}, "--context is 65, and .* takes windows of 2 to 64 tokens"),
]


@pytest.mark.parametrize(("change", "said"), BEFORE_THE_MODEL)
def test_an_option_out_of_range_is_named_before_the_model_is_loaded(change, said):
    with pytest.raises(UserError, match=said) as caught:
        check_options(options(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), [*WITH_THE_MODEL, BEFORE_THE_MODEL[0], BEFORE_THE_MODEL[2]])
def test_an_option_that_does_not_suit_the_model_is_named(loaded, change, said):
    with pytest.raises(UserError, match=said) as caught:
        make_request(loaded, loaded.name, options(**change))
    assert "\n" not in str(caught.value)


def test_an_id_that_the_model_does_not_know_is_refused_in_every_variant(loaded):
    """Some tokenizers are larger than their model (Gemma 3's by one image token)."""
    small = dataclasses.replace(loaded, vocab_size=len(loaded.tokenizer) - 1)
    last = loaded.tokenizer.convert_ids_to_tokens(small.vocab_size)
    assert make_request(small, small.name, options()).variants
    with pytest.raises(UserError, match=f"--mask-string '{last}' has the id {small.vocab_size}, .* ids below"):
        make_request(small, small.name, options(mask_string=last))
    with pytest.raises(UserError, match=f"--random-prob draws from .* the id {small.vocab_size}"):
        make_request(small, small.name, options(random_prob=0.1))


@given(st.text(max_size=12) | st.text("0123456789.,e- \n", max_size=12))
def test_any_text_for_a_probability_is_some_or_a_sentence(text):
    said = ""
    try:
        found = parse_probabilities(text, "--mask-prob")
    except UserError as error:
        found, said = [], str(error)
    assert all(0 < p <= 1 for p in found)
    assert "\n" not in said
    assert not said or said.startswith("--mask-prob is ")


def test_the_defaults_of_the_command_are_fine():
    check_options(Options())


def test_options_left_out_are_those_of_the_short_name():
    tiny = load_model("tiny", weights=False)
    request = make_request(tiny, "tiny", options(layers="", context=0))
    assert (request.dataset, request.window_tokens) == ("embedded", 64)
    assert len(request.hook_points) == 1


def test_every_spelling_of_several_sites_is_read_and_a_place_given_twice_harvested_once(loaded):
    layers = "1,resid_post.1,layers.1, model.layers.1,blocks.1.hook_resid_post,0,resid_pre.2,attn_out.1,layer_1_mlp_out"
    request = make_request(loaded, loaded.name, options(layers=layers))
    places = [("resid_post", 1), ("resid_post", 0), ("resid_pre", 2), ("attn_out", 1), ("mlp_out", 1)]
    assert request.hook_points == tuple(HookPoint(*place) for place in places)
    assert parse_layers("") == ()


def test_without_masking_there_is_only_the_clean_variant(loaded):
    request = make_request(loaded, loaded.name, options(mask_prob=0, mask_string="no single token"))
    assert [variant.name for variant in request.variants] == ["clean"]


def test_each_probability_is_a_variant_in_the_order_given(loaded):
    asked = options(mask_prob="0.5,0.3, 1", random_prob="0.2,0.1", mask_string="w3")
    variants = make_request(loaded, loaded.name, asked).variants
    facts = [(variant.name, variant.kind, variant.mask_prob) for variant in variants]
    assert facts == [
        ("clean", "clean", 0.0),
        ("masked", "mask", 0.5),
        ("masked_1", "mask", 0.3),
        ("masked_2", "mask", 1.0),
        ("random", "random", 0.2),
        ("random_1", "random", 0.1),
    ]
    token = make_tokenizer("gpt_neox").convert_tokens_to_ids("w3")
    assert [variant.mask_token for variant in variants] == [-1, token, token, token, -1, -1]


def test_eight_variants_fit_beside_the_clean_one(loaded):
    asked = options(mask_prob="0.1,0.2,0.3,0.4,0.5,0.6,0.7", random_prob="0.1")
    assert len(make_request(loaded, loaded.name, asked).variants) == 9


def test_whole_words_are_a_kind_of_their_own(loaded):
    variants = make_request(loaded, loaded.name, options(mask_unit="word")).variants
    assert [(variant.name, variant.kind) for variant in variants] == [("clean", "clean"), ("masked", "mask_word")]


def test_a_context_is_no_longer_than_a_cache_can_number_whatever_the_model_takes(loaded):
    endless = dataclasses.replace(loaded, max_tokens=None)
    assert make_request(endless, loaded.name, options(context=65_535)).window_tokens == 65_535
    assert make_request(endless, loaded.name, options(context=0)).window_tokens == 1024
    with pytest.raises(UserError, match="--context is 65536; give 2 to 65,535"):
        make_request(endless, loaded.name, options(context=65_536))


def test_every_option_that_decides_the_content_is_one_of_the_command():
    from harvest.__main__ import harvest

    parameters = inspect.signature(harvest).parameters
    for field in dataclasses.fields(Options):
        assert parameters[field.name].default == field.default, field.name
