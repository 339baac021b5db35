"""SAEs of other tools: what their folders compute, and one sentence for a folder that is damaged, with nothing run."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cache_spec import UserError
from train.commands.importing import app
from train.foreign import read_folder
from train.formats.dictionary_learning import CLASSES

D_IN, D_SAE, K = 6, 16, 3
GROUPS = [4, 4, 8]


def tensors_of(name: str, seed: int = 0, unit: bool = True) -> dict[str, torch.Tensor]:
    """What dictionary_learning saves for a class."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for theirs, ours in CLASSES[name].tensors.items():
        shape = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}.get(ours, (D_SAE,))
        value = torch.randn(shape, generator=generator)
        if ours == "W_dec" and unit:
            value = value / value.norm(dim=1, keepdim=True)
        found[theirs] = value.t().contiguous() if theirs in ("encoder.weight", "decoder.weight") else value
    if CLASSES[name].has_k:
        found |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    if CLASSES[name].has_groups:
        found["group_sizes"] = torch.tensor(GROUPS)
    return found


def trainer_of(name: str, **changes: Any) -> dict[str, Any]:
    plain = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 8, "lm_name": "EleutherAI/pythia"}
    return plain | {"submodule_name": "resid_post_layer_8", "k": K, "seed": 1, "lr": 3e-4, "steps": 100} | changes


def write(folder: Path, name: str, tensors: Any = None, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(tensors_of(name) if tensors is None else tensors, folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer_of(name, **changes), "buffer": {"ctx_len": 128}})
    )
    return folder


def by_hand(name: str, tensors: dict[str, torch.Tensor], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """encode and decode as dictionary_learning has them, in numpy."""
    w = {key: tensor.numpy() for key, tensor in tensors.items()}
    W_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    W_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    b_dec = next(w[key] for key in ("bias", "b_dec", "decoder_bias", "decoder.bias") if key in w)
    hidden = (x - b_dec * (name not in ("AutoEncoderNew", "JumpReluAutoEncoder"))) @ W_enc
    if name == "GatedAutoEncoder":
        f = (hidden + w["gate_bias"] > 0) * np.maximum(np.exp(w["r_mag"]) * hidden + w["mag_bias"], 0)
        return f, f @ W_dec + b_dec
    pre = hidden + (w["b_enc"] if "b_enc" in w else w["encoder.bias"])
    f = np.maximum(pre, 0)
    if name == "AutoEncoderTopK":
        np.put_along_axis(f, np.argsort(-f, axis=1)[:, K:], 0, axis=1)
    elif "threshold" in w:
        f = f * (pre > w["threshold"])
    return f, f @ W_dec + b_dec


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_of_dictionary_learning_computes_what_it_computes_there(name, tmp_path):
    tensors, x = tensors_of(name), np.random.default_rng(0).normal(size=(100, D_IN)).astype("f4")
    found = read_folder(write(tmp_path / "sae", name, tensors))
    f, made = by_hand(name, tensors, x)
    assert 0 < (f > 0).mean() < 0.9
    np.testing.assert_allclose(found.sae.encode(torch.from_numpy(x)).numpy(), f, atol=1e-5)
    np.testing.assert_allclose(found.sae(torch.from_numpy(x)).numpy(), made, atol=1e-5)
    assert found.metadata["hook_name"] == "blocks.8.hook_resid_post"
    assert found.metadata["model_name"] == "EleutherAI/pythia"
    assert found.sae.prefixes == ((4, 8, 16) if CLASSES[name].has_groups else (16,))
    assert found.k == (K if CLASSES[name].has_k else None)


@pytest.mark.parametrize("name", CLASSES)
def test_decoder_rows_of_any_length_go_into_the_codes(name, tmp_path):
    tensors, x = tensors_of(name, unit=False), np.random.default_rng(1).normal(size=(100, D_IN)).astype("f4")
    found = read_folder(write(tmp_path / "sae", name, tensors))
    f, made = by_hand(name, tensors, x)
    np.testing.assert_allclose(found.sae(torch.from_numpy(x)).numpy(), made, atol=1e-4)
    assert ((found.sae.encode(torch.from_numpy(x)).numpy() > 0) == (f > 0)).all()
    if name != "AutoEncoderTopK":
        torch.testing.assert_close(found.sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("change", ["half", "oldest", "unset", "other layer"])
def test_folders_that_differ_in_what_they_may_are_read(change, tmp_path):
    tensors = tensors_of("BatchTopKSAE" if change == "unset" else "AutoEncoderTopK")
    name, more = "AutoEncoderTopK", {}
    if change == "half":
        tensors = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}
    if change == "oldest":  # k in config.json alone, and no threshold
        tensors = {key: t for key, t in tensors.items() if key not in ("k", "threshold")}
    if change == "unset":
        name, tensors = "BatchTopKSAE", tensors | {"threshold": torch.tensor(-1.0)}
    if change == "other layer":
        more = {"submodule_name": "mlp_out_layer_8"}
    found = read_folder(write(tmp_path / "sae", name, tensors, **more))
    assert found.k == K
    assert found.sae.W_enc.dtype == torch.float32
    assert any("was never set" in note for note in found.notes) == (change == "unset")
    assert found.metadata["hook_name"] == f"blocks.8.hook_{'mlp_out' if change == 'other layer' else 'resid_post'}"


class Runs:
    """A pickle that would make a folder if anybody ran it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_in_ae_pt_is_run(tmp_path):
    for i, tensors in enumerate(
        (Runs(tmp_path / "ran"), {**tensors_of("AutoEncoder"), "more": Runs(tmp_path / "ran")})
    ):
        folder = write(tmp_path / f"sae{i}", "AutoEncoder", tensors)
        with pytest.raises(UserError, match=r"its ae\.pt is damaged, or holds more than tensors") as error:
            read_folder(folder)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def without(*names: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors_of("BatchTopKSAE").items() if key not in names}


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        (without("encoder.bias"), {}, "its weights lack encoder.bias, which BatchTopKSAE has"),
        (without() | {"extra": torch.ones(1)}, {}, "its weights hold extra, which BatchTopKSAE does not have"),
        (without() | {"b_dec": torch.ones(5)}, {}, r"its b_dec has the shape \[5\], not \[6\]"),
        (without() | {"b_dec": torch.full((6,), torch.nan)}, {}, "its b_dec holds NaN or infinity"),
        (without(), {"dict_size": 17}, r"its encoder.weight has the shape \[16, 6\], not \[17, 6\]"),
        (without(), {"dict_size": 10**12}, "its dict_size is 1000000000000, not a whole number"),
        (without("threshold"), {}, "its threshold is not one finite number"),
        (without() | {"threshold": torch.ones(16)}, {}, "its threshold is not one finite number"),
        (without() | {"k": torch.tensor(99)}, {}, "its k is 99, not a whole number above 0"),
        (without("k"), {"k": "many"}, 'its k is "many", not a whole number above 0'),
        (without(), {"activation_dim": None}, "its activation_dim is null"),
        (without(), {"dict_class": "CrossCoder"}, "its dict_class is 'CrossCoder', and granary reads AutoEncoder"),
        (without(), {"dict_class": ["x"]}, r"its dict_class is \['x'\]"),
        ([1, 2], {}, r"its ae\.pt is not a dict of tensors"),
        ({"encoder.weight": [1.0]}, {}, r"its ae\.pt is not a dict of tensors"),
    ],
)
def test_what_is_wrong_in_a_folder_of_dictionary_learning_is_named(tensors, changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_folder(write(tmp_path / "sae", "BatchTopKSAE", tensors, **changes))


def test_group_sizes_are_counts_of_each_group(tmp_path):
    tensors = tensors_of("MatryoshkaBatchTopKSAE") | {"group_sizes": torch.tensor([4, 8, 16])}
    with pytest.raises(UserError, match=r"its group_sizes are \[4, 8, 16\], which do not add up to its dict_size, 16"):
        read_folder(write(tmp_path / "sae", "MatryoshkaBatchTopKSAE", tensors))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 5000), flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=6))
def test_a_damaged_ae_pt_is_read_or_refused_in_one_sentence(cut, flips, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("damaged") / "sae", "AutoEncoder")
    data = bytearray((folder / "ae.pt").read_bytes())
    for place, value in flips:
        data[place % len(data)] = value
    (folder / "ae.pt").write_bytes(bytes(data[: max(0, len(data) - cut)]))
    with suppress(UserError):  # any other exception would be a traceback
        assert read_folder(folder).sae.d_sae == D_SAE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"trainer": 3}', "{", '{"trainer": {}}', "\udcff"])
def test_a_damaged_config_is_one_sentence(text, tmp_path):
    folder = write(tmp_path / "sae", "AutoEncoder")
    (folder / "config.json").write_bytes(text.encode("utf8", "surrogateescape"))
    with pytest.raises(UserError, match=r"sae: its (config\.json|dict_class)"):
        read_folder(folder)


def sparsify(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    folder.mkdir(parents=True)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(made | (tensors or {}), folder / "sae.safetensors")
    cfg = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K, "d_in": D_IN} | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    return folder


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_folder_of_sparsify_computes_what_it_computes_there(transcode, skip, tmp_path):
    if skip and not transcode:
        with pytest.raises(UserError, match="an SAE with a linear path beside its latents"):
            read_folder(sparsify(tmp_path / "layers.4", skip_connection=True))
        return
    more = {"W_skip": torch.randn(D_IN, D_IN)} if skip else {}
    folder = sparsify(tmp_path / "layers.4.mlp", more, transcode=transcode, skip_connection=skip)
    found, w = read_folder(folder), {key: t.numpy() for key, t in load_file(folder / "sae.safetensors").items()}
    x = np.random.default_rng(0).normal(size=(100, D_IN)).astype("f4")
    f = np.maximum((x - (0 if transcode else w["b_dec"])) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    np.put_along_axis(f, np.argsort(-f, axis=1)[:, K:], 0, axis=1)
    made = f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)
    np.testing.assert_allclose(found.sae.encode(torch.from_numpy(x)).numpy(), f, atol=1e-5)
    np.testing.assert_allclose(found.sae(torch.from_numpy(x)).numpy(), made, atol=1e-4)
    assert found.is_transcoder == transcode
    assert found.metadata.get("hook_name_out" if transcode else "hook_name") == "blocks.4.hook_mlp_out"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "groupmax"}, "its activation is groupmax, not topk"),
        ({"signed": True}, "its activation is signed topk"),
        ({"k": None}, "its k is missing, not a whole number"),
        ({"k": 17}, "its k is 17"),
        ({"d_in": "six"}, 'its d_in is "six"'),
        ({"num_latents": 15}, r"its W_dec has|its encoder.weight has the shape \[16, 6\], not \[15, 6\]"),
        ({"num_latents": 0}, r"has the shape \[16, 6\], not \[192, 6\]"),
    ],
)
def test_what_is_wrong_in_a_folder_of_sparsify_is_named(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_folder(sparsify(tmp_path / "layers.4", **changes))


def test_a_folder_of_no_tool_of_several_or_above_one_says_so(tmp_path):
    with pytest.raises(UserError, match=r"it has no ae\.pt or .*; give the folder of one SAE"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match=r"nowhere: there is no such folder; give the folder of one SAE"):
        read_folder(tmp_path / "nowhere")
    folder = sparsify(tmp_path / "root" / "layers.4")
    with pytest.raises(UserError, match=r"name one of the folders in it: layers\.4"):
        read_folder(tmp_path / "root")
    (folder / "ae.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"it has ae\.pt and sae\.safetensors, of several tools"):
        read_folder(folder)


def test_the_command_says_what_it_read_and_writes_a_saelens_folder(tmp_path):
    folder, out = write(tmp_path / "an sae", "MatryoshkaBatchTopKSAE"), tmp_path / "out"
    said = CliRunner().invoke(app, [str(folder)])
    assert said.exit_code == 0
    assert "dictionary_learning, jumprelu, 6 -> 16 latents, reads blocks.8.hook_resid_post" in said.output
    assert f"--sae '{folder}'" in said.output
    done = CliRunner().invoke(app, [str(folder), "--out", str(out)])
    assert f"--sae {out}" in done.output
    assert sorted(path.name for path in out.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    x, ours, again = torch.randn(50, D_IN), read_folder(folder), read_folder(out)
    assert again.sae.encode(x).equal(ours.sae.encode(x))
    assert again.metadata == ours.metadata
    assert (again.k, again.arch, again.sae.prefixes) == (K, "matryoshka", (4, 8, 16))
    taken = CliRunner().invoke(app, [str(folder), "--out", str(out)])
    assert "is there already" in str(taken.exception)
