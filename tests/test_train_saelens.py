"""What SAELens is given: names, shapes and numbers, with its encode and decode stated in numpy on the saved tensors.

benchmarks/compat.py asks SAELens itself.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from train_fixtures import run_config

from train.activations import BatchTopK, TopK
from train.kernels import select
from train.names import available
from train.sae import SparseAutoencoder
from train.saelens import architecture_of, assemble, fold, saelens_config
from train.step import TrainRun

D_MODEL, D_OUT, NORM, TARGET_NORM = 8, 6, 5.0, 0.3
CASES: dict[str, dict[str, Any]] = {arch: {"arch": arch} for arch in available("architectures")} | {
    "transcoder": {"arch": "standard", "d_out": D_OUT},
    "free_transcoder": {"arch": "standard_april", "d_out": D_MODEL},
    "jumprelu_transcoder": {"arch": "matryoshka", "d_out": D_OUT},
    "skip_transcoder": {"arch": "standard", "d_out": D_MODEL, "skip": True},
    "jumprelu_skip_transcoder": {"arch": "jumprelu", "d_out": D_OUT, "skip": True},
    "topk_to_same_width": {"arch": "topk", "d_out": D_MODEL},
    "gated_to_same_width": {"arch": "gated", "d_out": D_MODEL},
    "topk_transcoder": {"arch": "topk", "d_out": D_OUT},
    "gated_skip_transcoder": {"arch": "gated", "d_out": D_MODEL, "skip": True},
}
THEIRS = {
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "standard_april": "standard",
    "p_anneal": "standard",
    "free_transcoder": "transcoder",
    "topk_to_same_width": "topk",
    "gated_to_same_width": "gated",
}
COMMON = {"W_enc": (D_MODEL, 32), "b_enc": (32,), "W_dec": (32, D_MODEL), "b_dec": (D_MODEL,)}
GATED = {name: COMMON[name] for name in ("W_enc", "W_dec", "b_dec")}
GATED |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (32,))


def rows(seed: int) -> torch.Tensor:
    """[32, D_MODEL] in training units."""
    x = torch.randn(32, D_MODEL, generator=torch.Generator().manual_seed(seed)).relu() + 0.2
    return x / x.square().sum(1).mean().sqrt()


def trained(name: str) -> SparseAutoencoder:
    """After forty steps, in which thresholds, gates and decoder norms have moved."""
    case = CASES[name]
    d_out = case.get("d_out")
    config = run_config(case["arch"], skip=case.get("skip", False))
    run = TrainRun(config, D_MODEL, 60, select("dense", "cpu"), d_out=d_out)
    mixing = torch.randn(D_MODEL, d_out or D_MODEL, generator=torch.Generator().manual_seed(7))
    targets = [rows(seed) if d_out is None else torch.relu(rows(seed) @ mixing) for seed in range(40)]
    run.start_at(rows(0), None if d_out is None else targets[0])
    for seed in range(40):
        run.step(rows(seed), targets[seed])
    return run.sae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saes() -> dict[str, SparseAutoencoder]:
    return {name: trained(name) for name in CASES}


def facts_of(name: str) -> dict[str, Any]:
    target = {"hook": "layer_2", "tl_name": "blocks.2.hook_resid_post", "hf_name": "model.layers.2"}
    return {
        "name": name,
        "config": {"arch": CASES[name]["arch"]},
        "data": {},
        "cache": {
            "model": "made-up",
            "tl_name": "blocks.1.hook_resid_post",
            "hf_name": "model.layers.1",
            "dataset": "made-up text",
            "window_tokens": 10,
            "prepend_bos": True,
            "cache_id": "abc",
            "target": target if "d_out" in CASES[name] else None,
        },
    }


def target_norm(name: str) -> float | None:
    return TARGET_NORM if "d_out" in CASES[name] else None


def saved(name: str, sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """cfg.json and the tensors, through the bytes that the files would hold."""
    config = json.loads(json.dumps(saelens_config(sae, facts_of(name))))
    return config, load(save(fold(sae, NORM, target_norm(name))))


@pytest.mark.parametrize("name", CASES)
def test_the_reloaded_sae_does_on_raw_rows_what_the_trainer_did_on_normalised_ones(name, saes):
    sae = saes[name]
    again, x = assemble(*saved(name, sae)), rows(99) * NORM
    scale = target_norm(name) or NORM
    lengths = torch.ones(()) if CASES[name]["arch"] == "topk" else sae.W_dec.norm(dim=1)
    f, made = sae.encode(x / NORM) * scale * lengths, sae(x / NORM) * scale
    assert 0 < (f > 0).float().mean() < 0.95
    assert ((again.encode(x) > 0) == (f > 0)).all()
    assert ((again.encode(x) - f).norm() / f.norm()).item() < 1e-6
    assert ((again(x) - made).norm() / made.norm()).item() < 1e-6
    assert again.prefixes == sae.prefixes


@pytest.mark.parametrize("name", CASES)
def test_saving_what_was_loaded_gives_the_same_files(name, saes):
    config, tensors = saved(name, saes[name])
    again = assemble(config, tensors)
    assert saelens_config(again, facts_of(name)) == config
    refolded = fold(again, 1.0)
    assert refolded.keys() == tensors.keys()
    assert all(refolded[key].equal(tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", CASES)
def test_saelens_s_formulas_on_the_saved_tensors_give_our_sae(name, saes):
    config, tensors = saved(name, saes[name])
    w = {key: tensor.numpy() for key, tensor in tensors.items()}
    x = rows(98).numpy() * NORM
    inputs = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    hidden = inputs @ w["W_enc"] + w.get("b_enc", 0)
    features = np.maximum(hidden, 0)
    if "gated" in config["architecture"]:
        magnitudes = inputs @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"]
        features = np.maximum(magnitudes, 0) * (hidden + w["b_gate"] > 0)
    elif "topk" in config["architecture"]:
        assert config["rescale_acts_by_decoder_norm"] is False
        order = np.argsort(-features, axis=1)[:, config["k"] :]
        np.put_along_axis(features, order, 0, axis=1)
    elif "jumprelu" in config["architecture"]:
        features = features * (hidden > w["threshold"])
    made = features @ w["W_dec"] + w["b_dec"]
    if "skip" in config["architecture"]:
        made = made + x @ w["W_skip"].T
    again = assemble(config, tensors).requires_grad_(False)
    np.testing.assert_allclose(again.encode(torch.from_numpy(x)).numpy(), features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again(torch.from_numpy(x)).numpy(), made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_tensors_have_saelens_s_names_and_shapes(name, saes):
    config, tensors = saved(name, saes[name])
    expected = dict(GATED if CASES[name]["arch"] == "gated" else COMMON)
    d_out = CASES[name].get("d_out", D_MODEL)
    expected |= {"W_dec": (32, d_out), "b_dec": (d_out,)}
    if "jumprelu" in config["architecture"]:
        expected["threshold"] = (32,)
    if CASES[name].get("skip"):
        expected["W_skip"] = (d_out, D_MODEL)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("name", CASES)
def test_cfg_json_names_what_saelens_can_read(name, saes):
    config, _ = saved(name, saes[name])
    metadata = config["metadata"]
    is_transcoder = "d_out" in CASES[name]
    assert config["architecture"] == THEIRS.get(name, name)
    assert (config["d_in"], config["d_sae"], config["dtype"]) == (D_MODEL, 32, "float32")
    assert config.get("d_out") == (CASES[name]["d_out"] if config["architecture"].endswith("transcoder") else None)
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    subtracted = not is_transcoder and CASES[name]["arch"] not in ("jumprelu", "standard_april")
    assert config["apply_b_dec_to_input"] == subtracted
    assert config.get("k") == (3 if CASES[name]["arch"] == "topk" else None)
    assert metadata["sae_lens_version"] >= "6.0.0"
    assert (metadata["hook_name"], metadata["hf_hook_name"]) == ("blocks.1.hook_resid_post", "model.layers.1")
    assert metadata.get("hook_name_out") == ("blocks.2.hook_resid_post" if is_transcoder else None)
    assert metadata["granary"]["cache_id"] == "abc"
    if CASES[name]["arch"] == "matryoshka":
        assert metadata["training_architecture"] == "matryoshka_batchtopk"
        assert metadata["training_architecture_details"] == {"matryoshka_widths": [1, 3, 7, 15, 32]}
    else:
        assert metadata["training_architecture_details"] == {}


def test_folding_scales_biases_and_thresholds_and_leaves_unit_decoders_as_they_are(saes):
    sae = saes["jumprelu"]
    folded = fold(sae, 3.0)
    assert sae.threshold is not None
    assert folded["threshold"].equal(sae.threshold * 3)
    assert folded["b_enc"].equal(sae.b_enc * 3)
    assert folded["b_dec"].equal(sae.b_dec * 3)
    assert folded["W_enc"].equal(sae.W_enc)
    assert folded["W_dec"].equal(sae.W_dec)


def test_free_decoder_norms_go_into_codes_and_thresholds_but_for_a_top_k_and_for_zeros():
    x = rows(5)
    for activation in (BatchTopK(3), TopK(3)):
        sae = SparseAutoencoder(D_MODEL, 4, activation)
        with torch.no_grad():
            sae.W_enc.copy_(torch.randn(D_MODEL, 4, generator=torch.Generator().manual_seed(0)))
            sae.W_dec[:3] = sae.W_enc.t()[:3] * torch.tensor([2.0, 0.5, 1.5])[:, None]  # the fourth writes nothing
            if sae.threshold is not None:
                sae.threshold.fill_(0.2)
        facts = facts_of("batchtopk")
        again = assemble(saelens_config(sae, facts), fold(sae, 1.0))
        torch.testing.assert_close(again(x), sae(x))
        kept = sae.W_dec.norm(dim=1) if isinstance(activation, TopK) else torch.tensor([1.0, 1.0, 1.0, 0.0])
        torch.testing.assert_close(again.W_dec.norm(dim=1), kept)
        assert again.W_dec.isfinite().all()


def test_an_architecture_is_named_by_what_the_sae_does(saes):
    assert architecture_of(saes["topk"].with_threshold(0.5)) == "jumprelu"
    assert architecture_of(saes["skip_transcoder"].with_threshold(0.5)) == "jumprelu_skip_transcoder"


def test_what_does_not_fit_together_is_refused(saes):
    config, tensors = saved("gated", saes["gated"])
    for wrong in (config | {"d_sae": 31}, config | {"architecture": "standard"}):
        with pytest.raises(RuntimeError):
            assemble(wrong, tensors)
    with pytest.raises(KeyError):
        assemble(config | {"architecture": "temporal"}, tensors)
    with pytest.raises(RuntimeError):
        assemble(config, {name: tensor for name, tensor in tensors.items() if name != "r_mag"})


def test_no_case_is_left_out():
    assert {case["arch"] for case in CASES.values()} == set(available("architectures"))
