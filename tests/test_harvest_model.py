"""The model: its activations are those of the whole model, whatever its family; names that lead nowhere say so."""

import json
import shutil
from typing import Any

import pytest
import torch
from harvest_fixtures import FAMILIES, save_model
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from cache_spec import HookPoint, UserError
from cache_spec.hook_point import SITES
from harvest import model as model_module
from harvest.model import FAMILIES as TABLE
from harvest.model import SHORT_NAMES, activations, hf_name, load_model, logits, spliced_logits

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


def hooked_on_the_whole_model(loaded, tokens, path):
    """What a plain forward hook sees while the whole model runs."""
    seen = []
    handle = loaded.model.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        loaded.model(input_ids=tokens)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_the_table_and_these_tests_know_the_same_families():
    assert set(FAMILIES) == set(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", [site for site in SITES if site != "resid_pre"])
def test_activations_are_bit_equal_to_a_hook_on_the_whole_model(models, tokens, family, site):
    loaded = models[family]
    for layer in range(loaded.n_layers):
        point = HookPoint(site, layer)
        whole = hooked_on_the_whole_model(loaded, tokens, hf_name(loaded, point))
        assert torch.equal(activations(loaded, tokens, [point])[point], whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_does_not_leak_into_the_last_layer(models, tokens, family):
    loaded = models[family]
    normed = loaded.model.base_model(input_ids=tokens).last_hidden_state
    last = activations(loaded, tokens, [LAST])[LAST]
    assert last.shape == normed.shape
    assert not torch.allclose(last, normed, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_add_up_to_the_residual_stream(models, tokens, family):
    """So `attn_out` and `mlp_out` are what is added, after Gemma's norms, and `resid_pre` is what it is added to."""
    for layer in range(3):
        points = {site: HookPoint(site, layer) for site in SITES}
        found = activations(models[family], tokens, list(points.values()))
        total = found[points["resid_pre"]] + found[points["attn_out"]] + found[points["mlp_out"]]
        torch.testing.assert_close(total, found[points["resid_post"]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_ends_where_the_next_begins(models, tokens, family):
    end, begin = HookPoint("resid_post", 0), HookPoint("resid_pre", 1)
    found = activations(models[family], tokens, [begin, end])
    assert torch.equal(found[end], found[begin])


def test_layers_after_the_last_wanted_one_do_not_run(folders, tokens):
    loaded = load_model(str(folders["gpt_neox"]))
    n_calls = []
    for i in range(loaded.n_layers):
        layer = loaded.model.get_submodule(f"gpt_neox.layers.{i}")
        layer.register_forward_hook(lambda module, inputs, output, i=i: n_calls.append(i))
    activations(loaded, tokens, [HookPoint("resid_post", 1), HookPoint("mlp_out", 0)])
    assert n_calls == [0, 1]


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


def test_soft_capping_is_not_lost(folders, tokens):
    """Gemma-2 caps its attention scores, which SDPA cannot do; a cap of 0.1 has to be seen."""
    loaded, capped = (load_model(str(folders["gemma2"])) for _ in range(2))
    assert loaded.model.config._attn_implementation == "eager"
    for layer in range(3):
        attention: Any = capped.model.get_submodule(f"model.layers.{layer}.self_attn")
        attention.attn_logit_softcapping = 0.1
    assert not torch.allclose(logits(loaded, tokens), logits(capped, tokens), atol=1e-3)


def test_activations_may_enter_autograd(models, tokens):
    weight = torch.ones(16, requires_grad=True)
    (activations(models["gpt2"], tokens, [LAST])[LAST] * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("layer", [3, 99])
def test_an_unknown_layer_says_how_many_there_are(models, tokens, layer):
    with pytest.raises(UserError, match=rf"3 layers, numbered 0 to 2; there is no layer {layer}"):
        activations(models["gpt_neox"], tokens, [HookPoint("resid_post", layer)])


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


def test_the_revision_of_a_folder_follows_its_weights(folders, tmp_path):
    folder = shutil.copytree(folders["gpt2"], tmp_path / "copy")
    before = load_model(str(folder)).revision
    assert before == load_model(str(folders["gpt2"])).revision
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert load_model(str(folder)).revision != before


@pytest.mark.parametrize(
    ("saved", "asked", "got"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_the_model_runs_in_bfloat16_only_if_it_was_saved_or_asked_so(tmp_path, saved, asked, got):
    loaded = load_model(str(save_model(tmp_path, dtype=saved)), dtype=asked)
    assert (loaded.dtype, loaded.model.dtype) == (got, got)


def test_a_model_is_ready_to_run_and_not_to_train(models):
    for loaded in models.values():
        assert not loaded.model.training
        assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_without_weights_the_model_is_described_alike(folders):
    for folder in folders.values():
        whole, outline = load_model(str(folder)), load_model(str(folder), weights=False)
        for fact in ("name", "revision", "family", "n_layers", "d_model", "dtype"):
            assert getattr(outline, fact) == getattr(whole, fact)
        assert {weight.device.type for weight in outline.model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["pythia160m", "no such model", "", "/nowhere/at/all"])
def test_an_unknown_name_lists_the_short_names(name):
    with pytest.raises(UserError, match="short names: tiny, pythia-70m, pythia-160m, gpt2, gemma-2-2b"):
        load_model(name)


@pytest.mark.parametrize(("name", "repo"), [("owner/name", "owner/name"), ("pythia-160m", "pythia-160m-deduped")])
def test_without_a_network_the_hub_is_named(monkeypatch, tmp_path, name, repo):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"{repo}.*hub cannot be reached"):
        load_model(name)


def test_a_model_the_hub_does_not_have_says_so(monkeypatch):
    def download(repo, file, revision=None, local_files_only=False):
        raise LocalEntryNotFoundError("not here") if local_files_only else EntryNotFoundError("not there")

    monkeypatch.setattr(model_module, "hf_hub_download", download)
    with pytest.raises(UserError, match="hub has no model 'owner/name'"):
        load_model("owner/name")


def test_a_downloaded_model_needs_no_network_and_its_commit_is_its_revision(monkeypatch, folders, tmp_path):
    snapshot = shutil.copytree(folders["qwen3"], tmp_path / "snapshots" / "abc123")
    calls, revisions = [], []
    real_load, real_config = model_module._load, model_module.PreTrainedConfig.get_config_dict

    def download(repo, file, revision=None, local_files_only=False):
        calls.append(local_files_only)
        return str(snapshot / file)

    def load(name, source, at_commit, *more):
        revisions.append(at_commit)
        return real_load(name, str(snapshot), {}, *more)

    def config(source, **facts):
        return real_config(snapshot) if source == "owner/name" else real_config(source, **facts)

    monkeypatch.setattr(model_module, "hf_hub_download", download)
    monkeypatch.setattr(model_module, "_load", load)
    monkeypatch.setattr(model_module.PreTrainedConfig, "get_config_dict", staticmethod(config))
    loaded = load_model("owner/name")
    assert calls == [True]
    assert (loaded.name, loaded.revision, revisions) == ("owner/name", "abc123", [{"revision": "abc123"}])


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_an_unknown_architecture_is_named(folders, tmp_path):
    folder = shutil.copytree(folders["gpt_neox"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UserError, match=r"is a mamba model; granary knows .*gemma2, gpt2, gpt_neox"):
        load_model(str(folder))


def test_missing_weights_are_never_left_random(folders, tmp_path):
    folder = shutil.copytree(folders["gpt_neox"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.1" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights for 1 of the model's tensors"):
        load_model(str(folder))


def test_a_folder_without_weights_cannot_be_loaded(folders, tmp_path):
    folder = shutil.copytree(folders["gpt_neox"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize(("option", "value"), [("device", "teapot"), ("dtype", "int4")])
def test_a_wrong_device_or_dtype_is_refused(folders, option, value):
    with pytest.raises(UserError, match=value):
        load_model(str(folders["gpt_neox"]), **{option: value})
