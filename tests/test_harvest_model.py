"""The model: loaded as it was saved or asked for, refused with a sentence, and changed at its hook points."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harvest_fixtures import FAMILIES, make_tokenizer, save_model
from model_fixtures import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from cache_spec import HookPoint, UserError
from cache_spec.hook_point import SITES
from harvest import model as model_module
from harvest.model import SHORT_NAMES, activations, hf_name, load_model, logits, spliced_logits
from harvest.reader import release_rest

LAST = HookPoint("resid_post", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def models(folders):
    return {family: load_model(str(folder)) for family, folder in folders.items()}


@pytest.fixture
def tokens():
    return torch.randint(3, 40, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A model that a test may spoil."""
    return shutil.copytree(folders["gpt_neox"], tmp_path / "model")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def save_other(folder: Path, family: str, **changes) -> str:
    tiny_model(tiny_config(family, **changes)).save_pretrained(folder)
    make_tokenizer(family).save_pretrained(folder)
    return str(folder)


# ---- reading and splicing


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_add_up_to_the_residual_stream(models, tokens, family):
    """So `attn_out` and `mlp_out` are what is added, after Gemma's norms, and `resid_pre` is what it is added to."""
    for layer in range(3):
        points = {site: HookPoint(site, layer) for site in SITES}
        found = activations(models[family], tokens, list(points.values()))
        total = found[points["resid_pre"]] + found[points["attn_out"]] + found[points["mlp_out"]]
        torch.testing.assert_close(total, found[points["resid_post"]], rtol=1e-4, atol=1e-4)


def test_no_hook_stays_behind(models, tokens):
    loaded = models["gpt_neox"]
    before = logits(loaded, tokens)
    activations(loaded, tokens, [HookPoint("resid_post", 0), HookPoint("resid_pre", 1)])
    with pytest.raises(ZeroDivisionError):
        spliced_logits(loaded, tokens, LAST, lambda x: x / (1 // 0))
    assert torch.equal(logits(loaded, tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_splicing_the_activation_itself_changes_nothing_and_zeros_change_the_logits(models, tokens, family, site):
    loaded, point = models[family], HookPoint(site, 1)
    before = logits(loaded, tokens)
    assert torch.equal(spliced_logits(loaded, tokens, point, lambda x: x.clone()), before)
    changed = spliced_logits(loaded, tokens, point, torch.zeros_like)
    assert changed.shape == before.shape
    assert not torch.allclose(changed, before)


def test_what_is_spliced_is_what_later_layers_read(models, tokens):
    """Another text's activation at every layer's end gives that text's logits."""
    loaded, other = models["gemma2"], tokens.flip(1)
    foreign = activations(loaded, other, [LAST])[LAST]
    assert torch.equal(spliced_logits(loaded, tokens, LAST, lambda x: foreign), logits(loaded, other))


def test_a_reconstruction_in_another_precision_is_taken(models, tokens):
    doubled = spliced_logits(models["llama"], tokens, LAST, lambda x: x.double())
    assert torch.equal(doubled, logits(models["llama"], tokens))


@pytest.mark.parametrize("layer", [3, 99])
def test_an_unknown_layer_says_how_many_there_are(models, tokens, layer):
    with pytest.raises(UserError, match=rf"3 layers, numbered 0 to 2; there is no layer {layer}"):
        activations(models["gpt_neox"], tokens, [HookPoint("resid_post", layer)])


# ---- what is loaded


def test_the_tiny_model_has_the_hook_point_it_is_known_for():
    loaded = load_model("tiny")
    point = HookPoint.parse(SHORT_NAMES["tiny"].layers)
    assert hf_name(loaded, point).startswith("gpt_neox.layers.")
    assert loaded.name == "tiny"
    assert loaded.revision.startswith("sha256:")


def test_a_folder_loads_from_another_working_directory_by_its_lasting_name(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["llama"].parent)
    first = load_model(folders["llama"].name)
    monkeypatch.chdir(tmp_path)
    again = load_model(first.name)
    assert (again.name, again.revision) == (first.name, first.revision)


def test_a_model_of_the_hub_is_loaded_from_its_snapshot(monkeypatch, folders):
    """Its revision is the commit, and nothing is asked of the network after `locate`."""
    monkeypatch.setattr(model_module, "locate", lambda name, weights: (folders["qwen3"], "abc123"))
    loaded = load_model("owner/name@v1")
    assert (loaded.name, loaded.revision, loaded.family) == ("owner/name@v1", "abc123", "qwen3")


@pytest.mark.parametrize(
    ("saved", "asked", "got"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_the_model_runs_in_bfloat16_only_if_it_was_saved_or_asked_so(tmp_path, tokens, saved, asked, got):
    loaded = load_model(str(save_model(tmp_path, dtype=saved)), dtype=asked)
    assert (loaded.dtype, loaded.model.dtype) == (got, got)
    assert activations(loaded, tokens, [LAST])[LAST].dtype == got


def test_a_model_is_ready_to_run_and_not_to_train(models):
    for loaded in models.values():
        assert not loaded.model.training
        assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_without_weights_the_model_is_described_alike(folders, tmp_path):
    for folder in (*folders.values(), save_other(tmp_path, "opt")):
        whole, outline = load_model(str(folder)), load_model(str(folder), weights=False)
        for fact in (
            "name",
            "revision",
            "family",
            "places",
            "n_layers",
            "d_model",
            "vocab_size",
            "max_tokens",
            "dtype",
        ):
            assert getattr(outline, fact) == getattr(whole, fact)
        assert {weight.device.type for weight in outline.model.parameters()} == {"meta"}


def test_the_facts_of_a_model(models):
    facts = {(loaded.n_layers, loaded.d_model, loaded.max_tokens, loaded.is_whole) for loaded in models.values()}
    assert facts == {(3, 16, 64, True)}
    for loaded in models.values():
        assert loaded.vocab_size == len(loaded.tokenizer)


@pytest.mark.parametrize("family", ["bloom", "opt", "codegen"])
def test_a_family_without_a_row_is_loaded_and_read(tmp_path, tokens, family):
    loaded = load_model(save_other(tmp_path, family))
    assert loaded.family == family
    assert activations(loaded, tokens, [LAST])[LAST].shape == (4, 32, 16)
    assert loaded.max_tokens == (None if family == "bloom" else 64)


def test_a_family_that_cannot_be_proven_is_not_loaded(tmp_path):
    with pytest.raises(UserError, match=r"'.*' is a bert model and reads its text in both directions"):
        load_model(save_other(tmp_path, "bert"))


def test_weights_wait_on_the_host_until_the_rest_is_released(folders, monkeypatch):
    """The device is asked for when the model is loaded, and reached by what is needed alone."""
    moves = []
    monkeypatch.setattr(model_module, "_device", torch.device)
    monkeypatch.setattr("harvest.reader.torch.nn.Module.to", lambda model, device: moves.append(device))
    loaded = load_model(str(folders["gpt2"]), device="cuda:1", wait=True)
    assert (loaded.device, loaded.model.device, moves) == (torch.device("cuda:1"), torch.device("cpu"), [])
    release_rest(loaded, [HookPoint("resid_post", 0)])
    assert moves == [torch.device("cuda:1")]
    load_model(str(folders["gpt2"]), device="cuda:0")
    assert moves[1:] == [torch.device("cuda:0")]


# ---- attention


def test_soft_capping_is_not_lost(folders, tokens):
    """Gemma-2 caps its attention scores, which SDPA cannot do; a cap of 0.1 has to be seen.

    Not every release of transformers leaves SDPA alone then.
    """
    loaded, capped = (load_model(str(folders["gemma2"])) for _ in range(2))
    assert loaded.model.config._attn_implementation == "eager"
    for layer in range(3):
        attention: Any = capped.model.get_submodule(f"model.layers.{layer}.self_attn")
        attention.attn_logit_softcapping = 0.1
    assert not torch.allclose(logits(loaded, tokens), logits(capped, tokens), atol=1e-3)


def test_attention_is_what_was_asked_for_or_what_the_family_takes(folders, tokens):
    found = {}
    for asked, got in (("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        loaded = load_model(str(folders["llama"]), attention=asked)
        assert loaded.model.config._attn_implementation == got
        found[asked] = activations(loaded, tokens, [LAST])[LAST]
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=1e-4, atol=1e-4)


def test_attention_that_would_lose_the_cap_is_refused(folders):
    with pytest.raises(UserError, match="caps its attention scores, and sdpa would leave the cap out; use auto, eager"):
        load_model(str(folders["gemma2"]), attention="sdpa")


def test_attention_that_a_family_cannot_do_is_refused(tmp_path):
    folder = save_other(tmp_path, "bloom")
    with pytest.raises(UserError, match=r"cannot be loaded: Bloom.* does not support .*scaled_dot_product_attention"):
        load_model(folder, attention="sdpa")
    assert load_model(folder, attention="eager").model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bfloat16"), ("cpu", "float32")])
def test_flash_attention_says_what_it_needs(folders, device, dtype):
    with pytest.raises(UserError, match=f"needs --device cuda and --dtype .*; here they are {device} and {dtype}"):
        load_model(str(folders["llama"]), device=device, dtype=dtype, attention="flash_attention_2")


def test_flash_attention_that_is_not_installed_says_so(folders, monkeypatch):
    monkeypatch.setattr(model_module, "_device", lambda text: torch.device("cpu"))
    with pytest.raises(UserError, match="cannot be loaded: FlashAttention2 has been toggled on, but"):
        load_model(str(folders["llama"]), device="cuda", dtype="bfloat16", attention="flash_attention_2")


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("device", "teapot", "there is no device 'teapot' here; use cpu"),
        ("dtype", "int4", "'int4' is not a dtype for the model; use auto, float32, bfloat16, float16"),
        ("attention", "paged", "'paged' is no way to compute attention; use auto, sdpa, eager, flash_attention_2"),
    ],
)
def test_an_option_that_cannot_be_had_says_what_can(folders, option, value, wanted):
    with pytest.raises(UserError, match=wanted):
        load_model(str(folders["gpt_neox"]), **{option: value})


# ---- what is refused


def test_a_family_that_transformers_does_not_know_is_named(folder):
    edit_config(folder, model_type="nonesuch")
    with pytest.raises(UserError, match=r"is a nonesuch model, and transformers [\d.]+ knows no causal"):
        load_model(str(folder))


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_what_is_no_causal_model_is_named(folder, family):
    edit_config(folder, model_type=family)
    with pytest.raises(UserError, match=f"is a {family} model, and transformers .* no causal language model"):
        load_model(str(folder))


def test_an_encoder_and_a_decoder_are_refused(folder):
    edit_config(folder, model_type="bart", is_encoder_decoder=True)
    with pytest.raises(UserError, match=r"is an encoder and a decoder \(bart\); granary reads decoder-only"):
        load_model(str(folder))


def test_code_that_comes_with_a_model_is_never_run(folder):
    edit_config(folder, model_type="custom", auto_map={"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.C"})
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match=r"needs code that comes with it \('auto_map' .* never runs such code"):
        load_model(str(folder))


def test_code_that_comes_with_a_tokenizer_is_never_run(folder):
    path = folder / "tokenizer_config.json"
    changes = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    assert load_model(str(folder)).tokenizer.get_vocab() == make_tokenizer("gpt_neox").get_vocab()


def test_a_tokenizer_that_cannot_be_read_says_so(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer of '.*' cannot be loaded"):
        load_model(str(folder))


def test_a_config_that_is_no_json_says_so(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has a config\.json that is no JSON"):
        load_model(str(folder))


def test_missing_weights_are_never_left_random_and_only_we_say_so(folder, caplog):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.1" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights for 1 of the model's tensors"):
        load_model(str(folder))
    assert not caplog.text


def test_transformers_is_as_talkative_after_loading_as_before(folder):
    for loudness in (logging.WARNING, logging.ERROR, logging.WARNING):
        logging.set_verbosity(loudness)
        load_model(str(folder))
        assert logging.get_verbosity() == loudness


def test_weights_of_another_shape_are_refused(folder):
    edit_config(folder, intermediate_size=48)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder))


def test_a_truncated_file_of_weights_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder))


def test_every_refusal_is_one_line(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
