"""SAEs of others: computed as SAELens computes them, or refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_fixtures import no_model, small_cache, small_sae, write_run
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from cache_spec import CacheError, UserError
from evaluate.command import run
from evaluate.pretrained import find_pretrained, hook_of
from evaluate.runs import RunsIncomplete
from train.exported import write_folder
from train.foreign import read_folder
from train.formats.saelens import read_sae
from train.names import find

D_IN, D_SAE = 6, 16


def tensors(architecture: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found = {"W_enc": random(D_IN, D_SAE), "W_dec": random(D_SAE, D_IN), "b_dec": random(D_IN)}
    if architecture == "gated":
        return found | {name: random(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    found["b_enc"] = random(D_SAE)
    if architecture == "jumprelu":
        found["threshold"] = random(D_SAE).abs()
    if "batchtopk" in architecture:
        found["topk_threshold"] = torch.tensor(0.7, dtype=torch.float64)
    return found


def cfg(architecture: str, **changes: Any) -> dict[str, Any]:
    plain = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": True}
    plain |= {"normalize_activations": "none", "metadata": {"hook_name": "blocks.1.hook_resid_post"}}
    return plain | ({"k": 3} if architecture == "topk" else {}) | changes


def by_hand(facts: dict[str, Any], w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What SAELens computes, straight from its documentation."""
    scale = facts.get("norm_scaling_factor", 1.0)
    x = x * scale
    hidden = (x - w["b_dec"] * facts["apply_b_dec_to_input"]) @ w["W_enc"]
    norms = w["W_dec"].norm(dim=1) if facts.get("rescale_acts_by_decoder_norm") else torch.ones(D_SAE)
    if facts["architecture"] == "gated":
        magnitudes = torch.relu(hidden * w["r_mag"].exp() + w["b_mag"])
        codes = magnitudes * (hidden + w["b_gate"] > 0)
    else:
        pre = (hidden + w["b_enc"]) * norms
        codes = torch.relu(pre)
        if facts["architecture"] == "topk":
            kept = pre.topk(facts["k"], dim=1).indices
            codes = torch.zeros_like(codes).scatter(1, kept, codes.gather(1, kept))
        elif (threshold := w.get("threshold", w.get("topk_threshold"))) is not None:
            codes = codes * (pre > threshold)
    return ((codes / norms) @ w["W_dec"] + w["b_dec"]) / scale


@pytest.mark.parametrize(
    "facts",
    [
        *(cfg(name) for name in ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")),
        *(cfg(name, apply_b_dec_to_input=False) for name in ("standard", "jumprelu", "gated")),
        *(cfg(name, rescale_acts_by_decoder_norm=True) for name in ("topk", "batchtopk")),
        *(
            cfg(name, normalize_activations="expected_average_only_in", norm_scaling_factor=0.5)
            for name in ("standard", "jumprelu")
        ),
    ],
    ids=lambda facts: "-".join(map(str, (facts["architecture"], *sorted(facts.keys() - cfg("standard").keys())))),
)
def test_it_computes_what_saelens_computes(facts):
    weights, x = tensors(facts["architecture"]), torch.randn(50, D_IN, generator=torch.Generator().manual_seed(9))
    sae = read_sae(facts, weights)
    torch.testing.assert_close(sae(x), by_hand(facts, weights, x), rtol=1e-4, atol=1e-4)
    if facts["architecture"] != "topk":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_a_cfg_that_says_little_is_read_with_saelens_defaults():
    weights, x = tensors("standard"), torch.randn(5, D_IN, generator=torch.Generator().manual_seed(9))
    sae = read_sae({"d_in": D_IN, "d_sae": D_SAE}, weights)
    torch.testing.assert_close(sae(x), by_hand(cfg("standard"), weights, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (cfg("crosscoder"), "its architecture is 'crosscoder'"),
        (cfg("transcoder", apply_b_dec_to_input=False, d_out=D_IN), "it is a transcoder"),
        (cfg("standard", normalize_activations="layer_norm"), r"are normalised \(layer_norm\)"),
        (cfg("standard", normalize_activations="expected_average_only_in"), "by a factor that the folder does not"),
        (cfg("standard", reshape_activations="hook_z"), "its reshape_activations is hook_z"),
        (cfg("standard", activation_fn_str="topk"), "its activation_fn_str is topk"),
        (cfg("standard", finetuning_scaling_factor=True), "its finetuning_scaling_factor is True"),
        (cfg("standard", normalize_activations="expected_average_only_in", norm_scaling_factor=0.0), "by a fac"),
        (cfg("standard", norm_scaling_factor=float("inf")), r"its cfg.json cannot be read \(Infinity is no number\)"),
        (cfg("standard", d_sae=D_SAE + 1), r"its W_dec has the shape \[16, 6\], not \[17, 6\]|its W_enc has"),
        (cfg("standard", metadata="text"), 'its metadata is "text", not a JSON object'),
        (cfg("jumprelu", k="many"), 'its k is "many", not a number from 0 to its d_sae, 16'),
        (cfg("topk", k=17), "its k is 17, not a number from 0 to its d_sae, 16"),
        (cfg("standard", d_in="six"), 'its d_in is "six", not a whole number above 0'),
        (cfg("standard", apply_b_dec_to_input="false"), 'its apply_b_dec_to_input is "false", not true or false'),
        (cfg("standard", d_sae=None), "its d_sae is null, not a whole number above 0"),
        ({"architecture": "standard"}, "its d_in is missing, not a whole number above 0"),
        ({**cfg("topk"), "k": None}, "do not fit together"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused(facts, words, tmp_path):
    with pytest.raises(UserError, match=words):
        find_pretrained(str(write(tmp_path / "sae", facts)))


def test_metadata_may_be_null_and_a_cfg_is_an_object(tmp_path):
    folder = write(tmp_path / "sae", cfg("standard", metadata=None))
    assert find_pretrained(str(folder)).hook_name == ""
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(UserError, match=r"its cfg\.json is not a JSON object"):
        find_pretrained(str(folder))


def write(folder: Path, facts: dict[str, Any], **more: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(facts))
    save_file({**tensors(facts["architecture"]), **more}, folder / "sae_weights.safetensors")
    return folder


def test_unknown_tensors_and_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(UserError, match="its weights hold scaling_factor"):
        find_pretrained(str(write(tmp_path / "a", cfg("standard"), scaling_factor=torch.ones(1))))
    folder = write(tmp_path / "b", cfg("standard"))
    (folder / "sae_weights.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        find_pretrained(str(folder))
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"it has no .*sae_weights\.safetensors"):
        find_pretrained(str(folder))
    with pytest.raises(UserError, match="is neither a folder nor owner/name"):
        find_pretrained(str(tmp_path / "nowhere"))


def test_hub_ids_are_downloaded_two_files_alone(tmp_path, monkeypatch):
    folder, asked = write(tmp_path / "layer_1" / "width", cfg("standard")), []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(tmp_path / name) if "/" in name else str(folder / name)

    monkeypatch.setattr("evaluate.pretrained.hf_hub_download", download)
    found = find_pretrained("owner/name:layer_1/width")
    assert asked == [("owner/name", f"layer_1/width/{name}") for name in ("cfg.json", "sae_weights.safetensors")]
    assert found.name == "owner/name:layer_1/width"
    find_pretrained("owner/name")
    assert asked[-1] == ("owner/name", "sae_weights.safetensors")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def offline(*_: str) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("evaluate.pretrained.hf_hub_download", offline)
    with pytest.raises(UserError, match=r"--sae owner/name is not a folder here and cannot be downloaded \(offline"):
        find_pretrained("owner/name")


def test_the_hook_point_is_the_given_one_its_own_or_asked_for(tmp_path):
    cache = small_cache(tmp_path / "cache")
    hook = cache.plan.hooks[0]
    known = find_pretrained(str(write(tmp_path / "a", cfg("standard", metadata={"hook_name": hook.tl_name}))))
    silent = find_pretrained(str(write(tmp_path / "b", cfg("standard", metadata={}))))
    other = find_pretrained(
        str(write(tmp_path / "c", cfg("standard", metadata={"hook_name": "blocks.9.hook_mlp_out"})))
    )
    wide = find_pretrained(str(write(tmp_path / "d", cfg("standard", metadata={}))))
    wide = type(wide)(name="wide", files=wide.files, sae=small_sae(0, d_model=8), metadata={})
    assert hook_of(known, cache, "") == hook_of(other, cache, hook.name) == hook
    if len(cache.plan.hooks) == 1:
        assert hook_of(silent, cache, "") == hook
    with pytest.raises(UserError, match=r"reads blocks.9.hook_mlp_out, and .* holds .*; name one with --hook"):
        hook_of(other, cache, "")
    with pytest.raises(UserError, match="--sae wide: it reads 8 dimensions"):
        hook_of(wide, cache, hook.name)
    with pytest.raises(CacheError, match="not layer_77"):
        hook_of(known, cache, "layer_77")


def test_it_stands_in_the_table_alone_and_beside_runs_and_is_paired_with_nothing(tmp_path, monkeypatch, capsys):
    no_model(monkeypatch)
    cache = small_cache(tmp_path / "cache")
    hook = cache.plan.hooks[0]
    sae = write(tmp_path / "sae", cfg("jumprelu", metadata={"hook_name": hook.tl_name}))
    run(None, saes=[str(sae)], cache=cache.path, metrics="core", out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(r["kind"], r["recipe"], r["arch"]) for r in report["recipes"]] == [("pretrained", str(sae), "jumprelu")]
    assert len(list((tmp_path / "out").glob("*/report.json"))) == 1
    for seed in range(2):
        write_run(tmp_path / "runs", cache, small_sae(seed), seed=seed)
    run(tmp_path / "runs", saes=[str(sae)], metrics="core", out=tmp_path / "runs")
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert {r["kind"] for r in report["recipes"]} >= {"pretrained", "trained"}
    assert report["differences"] == []
    with pytest.raises(RunsIncomplete, match=r"1 of 3 SAEs are not in the report; .*nowhere"):
        run(tmp_path / "runs", saes=["nowhere"], metrics="core", out=tmp_path / "runs")
    with pytest.raises(RunsIncomplete, match="say which cache with --cache"):
        run(None, saes=[str(sae)], metrics="core", out=tmp_path / "other")
    capsys.readouterr()
    run(tmp_path / "runs", saes=[str(sae)], metrics="core", out=tmp_path / "runs")
    assert "8 of 8 were measured before" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["dictionary_learning", "sparsify"])
def test_folders_of_other_tools_are_measured_as_they_are(to, tmp_path, monkeypatch):
    no_model(monkeypatch)
    cache = small_cache(tmp_path / "cache")
    hook = cache.plan.hooks[0]
    folder = write(tmp_path / "sae", cfg("topk", metadata={"hook_name": hook.tl_name}))
    made = find("formats", to).write(read_folder(folder))
    other = tmp_path / (made.subfolder or "other")
    write_folder(other, made.files)
    run(None, saes=[str(folder), str(other)], cache=cache.path, metrics="core", out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = report["recipes"]
    assert {first["recipe"], second["recipe"]} == {str(folder), str(other)}
    assert first["metrics"] == second["metrics"]


def test_on_the_hub_the_files_of_other_tools_are_looked_for_where_saelens_s_are_missing(tmp_path, monkeypatch):
    folder = write(tmp_path / "sae", cfg("topk"))
    write_folder(tmp_path / "hub" / "x", find("formats", "dictionary_learning").write(read_folder(folder)).files)

    def download(_: str, name: str) -> str:
        if not (tmp_path / "hub" / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("evaluate.pretrained.hf_hub_download", download)
    assert find_pretrained("owner/name:x").k == 3
    with pytest.raises(UserError, match=r"the hub has no SAE of that name \(y/cfg\.json\)"):
        find_pretrained("owner/name:y")
