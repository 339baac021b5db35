"""Exports: each format's exact files, the same encode and decode once they are read again, and what is refused."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from train_fixtures import DATA, make_training_cache, run_config
from typer.testing import CliRunner

from cache_spec import UserError
from train.activations import BatchTopK, ReLU, Threshold, TopK
from train.commands.export import app
from train.exported import write_folder
from train.foreign import read_folder
from train.loader import MixedBatchLoader
from train.names import available, find
from train.run_folder import load_run, without_seal
from train.sae import SparseAutoencoder
from train.stored import Stored
from train.sweep import train_sweep

ARCHES = available("architectures")
FORMATS = available("formats")
D_MODEL, D_SAE = 8, 32
ENCODER = {"encoder.weight": (D_SAE, D_MODEL), "encoder.bias": (D_SAE,), "decoder.weight": (D_MODEL, D_SAE)}
PLAIN = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
WITH_K = {"k": (), "threshold": ()}
AE_PT = {  # architecture -> dict_class, trainer_class and the shapes in ae.pt
    "standard": ("AutoEncoder", "StandardTrainer", {**ENCODER, "bias": (D_MODEL,)}),
    "standard_april": ("AutoEncoder", "StandardTrainerAprilUpdate", {**ENCODER, "bias": (D_MODEL,)}),
    "p_anneal": ("AutoEncoder", "PAnnealTrainer", {**ENCODER, "bias": (D_MODEL,)}),
    "gated": (
        "GatedAutoEncoder",
        "GatedSAETrainer",
        {name: ENCODER[name] for name in ("encoder.weight", "decoder.weight")}
        | {"decoder_bias": (D_MODEL,), "r_mag": (D_SAE,), "gate_bias": (D_SAE,), "mag_bias": (D_SAE,)},
    ),
    "topk": ("AutoEncoderTopK", "TopKTrainer", {**ENCODER, "b_dec": (D_MODEL,), **WITH_K}),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer", {**ENCODER, "b_dec": (D_MODEL,), **WITH_K}),
    "matryoshka": (
        "MatryoshkaBatchTopKSAE",
        "MatryoshkaBatchTopKTrainer",
        {**PLAIN, **WITH_K, "group_sizes": (5,)},
    ),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer", {**PLAIN, "threshold": (D_SAE,)}),
}
TRAINER = {"trainer_class", "dict_class", "activation_dim", "dict_size", "layer", "lm_name", "submodule_name", "seed"}
TRAINER |= {"steps", "lr", "device", "wandb_name"}
GROUPED = {"group_fractions", "group_weights", "group_sizes", "top_k_aux", "auxk_alpha", "threshold_beta"}
GROUPED |= {"threshold_start_step", "warmup_steps", "decay_start"}
TO_SAME = {"topk_transcoder": {}, "topk_skip": {"skip": True}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run of every architecture, and transcoders from layer 1 to layer 2."""
    folder = tmp_path_factory.mktemp("export")
    cache, short = make_training_cache(folder / "cache", layers=(1, 2)), replace(DATA, n_tokens=32 * 30)
    train_sweep(MixedBatchLoader(cache, short), [run_config(arch) for arch in ARCHES], out=folder / "runs")
    transcoders = [run_config("topk", name=name, **more) for name, more in TO_SAME.items()]
    transcoders += [run_config(arch, name=f"{arch}_transcoder") for arch in ("gated", "standard", "jumprelu")]
    transcoders += [run_config("gated", name="gated_skip", skip=True)]
    train_sweep(MixedBatchLoader(cache, replace(short, target_hook="layer_2")), transcoders, out=folder / "runs")
    return folder / "runs"


def rows(scale: float = 4.0) -> torch.Tensor:
    return torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(3)) * scale + 0.5


def export(run: Path, to: str, out: Path, **more: Any) -> Path:
    made = find("formats", to).write(read_folder(run), **more)
    write_folder(out / made.subfolder, made.files)
    return out / made.subfolder


def assert_the_same(ours: SparseAutoencoder, again: SparseAutoencoder, x: torch.Tensor) -> None:
    with torch.no_grad():
        f, g = ours.encode(x), again.encode(x)
        assert ((f > 0) == (g > 0)).all()
        assert (f - g).norm() <= 1e-6 * f.norm()
        assert (ours(x) - again(x)).norm() <= 1e-6 * ours(x).norm()


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("arch", ARCHES)
def test_what_was_exported_and_is_read_again_computes_the_same_on_raw_rows(arch, to, runs, tmp_path):
    ours, again = load_run(runs / arch), read_folder(export(runs / arch, to, tmp_path / "out"))
    assert (ours.sae.encode(rows()) > 0).any()
    assert_the_same(ours.sae, again.sae, rows())
    assert again.sae.prefixes == ours.sae.prefixes
    assert again.arch == arch
    assert again.metadata["hook_name"] == "blocks.1.hook_resid_post"
    twice = read_folder(export(tmp_path / "out", to, tmp_path / "twice"))
    assert_the_same(again.sae, twice.sae, rows())


@pytest.mark.parametrize("name", ["topk", *TO_SAME])
def test_a_top_k_survives_sparsify_also_as_a_transcoder(name, runs, tmp_path):
    folder = export(runs / name, "sparsify", tmp_path)
    again = read_folder(folder)
    assert folder.name == ("layers.1" if name == "topk" else "layers.2")
    assert_the_same(load_run(runs / name).sae, again.sae, rows())
    assert again.is_transcoder == (name != "topk")
    tensors, cfg = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
    shapes = {"encoder.weight": (D_SAE, D_MODEL), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_MODEL)}
    shapes |= {"b_dec": (D_MODEL,), **({"W_skip": (D_MODEL, D_MODEL)} if name == "topk_skip" else {})}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    assert cfg == {
        "activation": "topk",
        "expansion_factor": 4,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": 3,
        "multi_topk": False,
        "skip_connection": name == "topk_skip",
        "transcode": name != "topk",
        "d_in": D_MODEL,
    }


@pytest.mark.parametrize("arch", ARCHES)
def test_dictionary_learning_gets_its_keys_shapes_and_settings(arch, runs, tmp_path):
    folder = export(runs / arch, "dictionary_learning", tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"ae.pt", "config.json"}
    dict_class, trainer_class, shapes = AE_PT[arch]
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    assert type(tensors) is dict
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    config = json.loads((folder / "config.json").read_text())
    trainer = config["trainer"]
    wanted = TRAINER | ({"k"} if "k" in shapes else set()) | (GROUPED if arch == "matryoshka" else set())
    assert trainer.keys() == wanted
    assert (trainer["dict_class"], trainer["trainer_class"]) == (dict_class, trainer_class)
    assert (trainer["layer"], trainer["submodule_name"], trainer["lm_name"]) == (1, "resid_post_layer_1", "made-up")
    assert (trainer["seed"], trainer["steps"], trainer["lr"]) == (0, 30, 0.01)
    assert config["buffer"]["ctx_len"] == 10
    if "k" in shapes:
        assert tensors["k"].dtype == torch.int32
        assert tensors["k"].item() == trainer["k"] == 3
        assert tensors["threshold"].dtype == torch.float32
        assert (tensors["threshold"] == -1) == (arch == "topk")
    if arch == "matryoshka":
        prefixes = load_run(runs / arch).sae.prefixes
        assert tensors["group_sizes"].tolist() == [b - a for a, b in pairwise((0, *prefixes))]
        assert trainer["group_sizes"] == tensors["group_sizes"].tolist()


def test_saelens_gets_the_run_s_own_files(runs, tmp_path):
    folder = export(runs / "matryoshka", "saelens", tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    for path in folder.iterdir():
        assert path.read_bytes() == (runs / "matryoshka" / path.name).read_bytes()


@pytest.mark.parametrize("arch", sorted(set(ARCHES) - {"topk"}))
def test_sparsify_gets_a_top_k_that_is_only_close_where_one_asks_for_it(arch, runs, tmp_path):
    with pytest.raises(UserError, match="its codes would change; export it --approximate"):
        find("formats", "sparsify").write(read_folder(runs / arch))
    made = find("formats", "sparsify").write(read_folder(runs / arch), approximate=True)
    assert any(note.startswith("approximate: sparsify keeps the") for note in made.notes)
    write_folder(tmp_path / "out", made.files)
    sae, again, x = load_run(runs / arch).sae, read_folder(tmp_path / "out").sae, rows()
    k = json.loads(made.files["cfg.json"])["k"]
    l0 = load_run(runs / arch).facts["held_out"]["l0"]
    assert k == (3 if arch in ("batchtopk", "matryoshka") else round(l0))
    wide = (sae.encode(x) > 0).sum(1) == k
    if arch != "gated":  # where as many are on as it keeps, nothing changed
        torch.testing.assert_close(again(x[wide]), sae(x[wide]), rtol=1e-4, atol=1e-4)
    assert find("formats", "sparsify").write(read_folder(runs / arch), approximate=True, k=2).files != made.files


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("topk_transcoder", "dictionary_learning", "name one place in the model, and a transcoder has two"),
        ("standard_transcoder", "dictionary_learning", "a transcoder has two"),
        ("topk_skip", "saelens", "SAELens has no topk skip transcoder"),
        ("gated_skip", "saelens", "SAELens has no gated skip transcoder"),
        ("jumprelu_transcoder", "sparsify", "this SAE \\(jumprelu\\) does not"),
    ],
)
def test_what_a_format_cannot_say_is_refused(name, to, words, runs):
    with pytest.raises(UserError, match=words):
        find("formats", to).write(read_folder(runs / name))


@pytest.mark.parametrize("name", ["topk_transcoder", "gated_transcoder", "standard_transcoder", "jumprelu_transcoder"])
def test_transcoders_go_to_saelens_and_stay_transcoders(name, runs, tmp_path):
    again = read_folder(export(runs / name, "saelens", tmp_path / "out"))
    assert again.is_transcoder
    assert_the_same(load_run(runs / name).sae, again.sae, rows())


def stored(sae: SparseAutoencoder, seed: int, **metadata: Any) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if sae.threshold is not None:
            sae.threshold.abs_()
    return Stored(sae=sae.requires_grad_(False), metadata={"hook_name": "blocks.3.hook_mlp_out", **metadata})


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["relu", "topk", "jumprelu", "gated"]),
    subtract=st.booleans(),
    to=st.sampled_from(["saelens", "dictionary_learning", "sparsify"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_any_sae_keeps_its_reconstruction_whether_or_not_it_subtracts_b_dec(
    seed, kind, subtract, to, scale, tmp_path_factory
):
    """Decoder rows of any length, thresholds of their own; the codes are those of rows of length 1."""
    if to == "sparsify" and kind != "topk":
        return
    activation = {"topk": TopK(3), "jumprelu": Threshold()}.get(kind, ReLU())
    sae = SparseAutoencoder(D_MODEL, 16, activation, subtract_b_dec=subtract, gated=kind == "gated")
    if kind == "jumprelu":
        sae.threshold = torch.empty(16)
    made = find("formats", to).write(stored(sae, seed))
    folder = tmp_path_factory.mktemp("any") / "out"
    write_folder(folder, made.files)
    again, x = read_folder(folder).sae, rows(scale)
    with torch.no_grad():
        same = ((again.encode(x) > 0) == (sae.encode(x) > 0)).all(1)  # but for a code on the edge
        assert same.float().mean() > 0.98
        assert (again(x)[same] - sae(x)[same]).norm() <= 1e-5 * sae(x).norm()
    if kind != "topk":
        torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(16))


def test_a_batchtopk_with_decoder_rows_of_any_length_becomes_a_jumprelu_there():
    sae = SparseAutoencoder(D_MODEL, 16, BatchTopK(3))
    free = stored(sae, 0, training_architecture="batchtopk", training_architecture_details={"k": 3})
    made = find("formats", "dictionary_learning").write(free)
    assert made.kind == "JumpReluAutoEncoder"
    assert any("thresholds of their own" in note for note in made.notes)
    assert any("take mlp_out.3 for resid_post" in note for note in made.notes)
    assert json.loads(made.files["config.json"])["trainer"]["trainer_class"] == "JumpReluTrainer"


def test_a_decoder_that_is_not_of_length_1_is_said(runs, tmp_path):
    folder = tmp_path / "free"
    write_folder(folder, find("formats", "saelens").write(stored(SparseAutoencoder(D_MODEL, 16, TopK(3)), 0)).files)
    assert read_folder(folder).notes == ("16 of 16 decoder rows do not have length 1, which SAEBench wants",)
    assert not read_folder(runs / "topk").notes


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_once_and_says_what_it_made(runs, tmp_path):
    out = tmp_path / "out"
    done = command(runs / "batchtopk", "--to", "dictionary_learning", "--out", out)
    assert done.exit_code == 0
    assert "ae.pt (BatchTopKSAE, 8 -> 32 latents)" in done.output
    before = {path: path.read_bytes() for path in out.iterdir()}
    again = command(runs / "topk", "--to", "dictionary_learning", "--out", out)
    assert "is there already; name a new or empty folder" in str(again.exception)
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    for name in ("topk", "topk_transcoder"):  # two hook points in one root
        assert command(runs / name, "--to", "sparsify", "--out", tmp_path / "root").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["batchtopk", "--to", "sparsify"], "cannot become a folder of sparsify: sparsify computes a top-k"),
        (["batchtopk", "--to", "onnx"], "there is no format 'onnx'; there are dictionary_learning, saelens, sparsify"),
        (["batchtopk", "--to", "sparsify", "--k", "4"], "--k is for --approximate"),
        (["batchtopk", "--to", "sparsify", "--approximate", "--k", "99"], "--k 99 is more than its 32 latents"),
        (["topk", "--to", "sparsify", "--approximate", "--k", "4"], "its own k is 3; leave --k out"),
        (["batchtopk", "--to", "saelens", "--approximate"], "saelens holds the SAE as it is, leave it out"),
        (["nowhere", "--to", "saelens"], "there is no such folder; give the folder of one SAE"),
    ],
)
def test_a_command_that_cannot_be_done_is_one_sentence_and_writes_nothing(words, sentence, runs, tmp_path):
    done = command(runs / words[0], *words[1:], "--out", tmp_path / "out")
    assert isinstance(done.exception, UserError)
    assert sentence in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_no_sae(runs, tmp_path):
    (tmp_path / "run").mkdir()
    facts = json.loads((runs / "topk" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**without_seal(facts), "status": "training"}))
    done = command(tmp_path / "run", "--to", "saelens", "--out", tmp_path / "out")
    assert "is not finished; run the same `python -m train` command with --resume" in str(done.exception)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"lies under .*file, which is a file"):
        write_folder(tmp_path / "file" / "out", {"a": b"1"})
    with pytest.raises(OSError):
        write_folder(tmp_path / "out", {"a": b"1", "b" * 300: b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_that_another_process_finished_first_is_refused_in_a_sentence(tmp_path, monkeypatch):
    def overtaken(self, target, replace=Path.replace):
        target.mkdir()
        (target / "theirs").touch()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    with pytest.raises(UserError, match="is there already"):
        write_folder(tmp_path / "made", {"a": b"x"})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"] == ["theirs"]
