"""Tensors and settings from a stranger: of a type, a size or a length that cannot be computed with or told."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from fuzz_fixtures import sealed, spelled
from fuzz_runs import use_sae
from fuzz_targets import target
from safetensors.torch import load_file, save, save_file
from train_fixtures import run_config

from cache_spec import UserError
from cache_spec.files import crc32c
from train.checkpoint import restore_checkpoint
from train.foreign import read_folder
from train.kernels import select
from train.step import TrainRun


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    target("run.json", folder)
    return folder


@pytest.mark.parametrize("kind", [torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("folder", "file"),
    [
        *(("runs/topk", "sae_weights.safetensors"), ("saelens", "sae_weights.safetensors")),
        *(("sparsify", "sae.safetensors"), ("dictionary_learning", "ae.pt")),
    ],
)
def test_weights_of_which_a_part_would_be_thrown_away_are_refused(made, tmp_path, folder, file, kind):
    sae = Path(shutil.copytree(made / folder, tmp_path / "sae"))
    read = partial(torch.load, weights_only=True) if file == "ae.pt" else load_file
    for name, tensor in read(made / folder / file).items():
        (torch.save if file == "ae.pt" else save_file)(
            {**read(made / folder / file), name: tensor.to(kind)}, sae / file
        )
        with pytest.raises(UserError, match=rf"its {name} has numbers of the type {str(kind)[6:]}"):
            read_folder(sae)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        *(("k", torch.tensor(number), "its k ") for number in (3.0, torch.nan, torch.inf, True, 10**12)),
        *(
            ("group_sizes", torch.tensor(sizes), "group_sizes")
            for sizes in ([torch.nan], [torch.inf, 1.0], [0], [True])
        ),
        ("group_sizes", torch.full([10_000], -1), "group_sizes are .{80}, which"),
    ],
)
def test_a_count_in_an_ae_pt_that_is_none_is_refused(made, tmp_path, name, value, word):
    sae = Path(shutil.copytree(made / "dictionary_learning", tmp_path / "sae"))
    torch.save({**torch.load(sae / "ae.pt", weights_only=True), name: value}, sae / "ae.pt")
    trainer = json.loads((sae / "config.json").read_bytes())["trainer"]
    if name == "group_sizes":
        trainer["dict_class"] = "MatryoshkaBatchTopKSAE"
        (sae / "config.json").write_bytes(spelled({"trainer": trainer}))
    with pytest.raises(UserError, match=word):
        read_folder(sae)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("silent_tokens", torch.zeros(3, dtype=torch.int64)),
        ("silent_tokens", torch.zeros(32)),
        ("adam.W_enc.exp_avg", torch.zeros(1)),
        ("adam.W_enc.step", torch.zeros(2)),
        ("sae.b_enc", torch.zeros(32, dtype=torch.complex64)),
    ],
)
def test_a_checkpoint_of_other_tensors_is_not_gone_on_with(made, tmp_path, name, value):
    folder = Path(shutil.copytree(made / "stopped", tmp_path / "run"))
    for file in (folder / "state").glob("*.safetensors"):
        data = save({**load_file(file), name: value})
        file.write_bytes(data)
        facts = {"n_done": int(file.stem[5:]), "n_bytes": len(data), "tensors_crc32c": f"{crc32c(data):08x}"}
        file.with_suffix(".json").write_bytes(spelled(sealed(facts)))
    with pytest.raises(UserError, match=f"no checkpoint .* is whole .*its {name} is"):
        restore_checkpoint(folder, TrainRun(run_config(), 8, 60, select("dense", "cpu")))


@pytest.mark.parametrize(
    "changes",
    [
        *({"normalize_activations": "x" * 5000}, {"architecture": "x" * 5000}, {"reshape_activations": ["x"] * 5000}),
        *({"metadata": {"sae_lens_version": version}} for version in ("9" * 5000, "²", "٣", None, [])),
        {"metadata": {"granary": {"config": {"arch": "batchtopk", "k": 10**39}}}},
    ],
)
def test_what_a_cfg_says_at_length_or_in_other_letters_is_no_traceback(made, tmp_path, changes):
    sae = Path(shutil.copytree(made / "saelens", tmp_path / "sae"))
    facts = json.loads((sae / "cfg.json").read_bytes())
    metadata = {**facts["metadata"], **changes.get("metadata", {})}
    (sae / "cfg.json").write_bytes(spelled({**facts, **changes, "metadata": metadata}))
    use_sae(sae)


@pytest.mark.parametrize(
    ("folder", "file", "changes"),
    [
        ("dictionary_learning", "config.json", {"trainer": {"dict_class": "x" * 5000}}),
        ("sparsify", "cfg.json", {"activation": "x" * 5000}),
    ],
)
def test_what_another_tool_says_at_length_is_cut(made, tmp_path, folder, file, changes):
    sae = Path(shutil.copytree(made / folder, tmp_path / "sae"))
    (sae / file).write_bytes(spelled({**json.loads((sae / file).read_bytes()), **changes}))
    with pytest.raises(UserError, match=r"x{70}") as caught:
        read_folder(sae)
    assert len(str(caught.value)) < 600
