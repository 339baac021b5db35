"""Run folders: what is saved is what was trained, in raw units, in SAELens's form."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from train_fixtures import DATA, SCALE, make_training_cache, run_config

import train
from cache_spec import UserError
from train.held_out import held_out_rows, measure_held_out
from train.kernels import select
from train.loader import MixedBatchLoader
from train.run_folder import fold, load_run
from train.step import TrainRun
from train.sweep import train_sweep

ARCHES = ["standard", "topk", "batchtopk", "matryoshka", "jumprelu"]


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("folder") / "cache"), DATA)


@pytest.fixture(scope="module")
def trained(loader, tmp_path_factory):
    """The runs' folders, and each SAE as it was in training."""
    out = tmp_path_factory.mktemp("runs")
    in_training = {}
    with pytest.MonkeyPatch.context() as patch:
        step = TrainRun.step

        def spy(self, x, target):
            in_training[self.config.name] = self.sae
            return step(self, x, target)

        patch.setattr(TrainRun, "step", spy)
        train_sweep(loader, [run_config(arch, masked_fraction=0.5) for arch in ARCHES], out=out)
    return out, in_training


def raw_rows(loader: MixedBatchLoader) -> torch.Tensor:
    stored = loader.cache.activations("layer_1", "clean", loader.cache.held_out_shards[0])
    return torch.from_numpy(stored.astype(np.float32)) * SCALE


@pytest.mark.parametrize("arch", ARCHES)
def test_a_loaded_run_does_on_raw_rows_what_was_trained_on_normalised_ones(arch, trained, loader):
    out, in_training = trained
    run = load_run(out / arch)
    x, norm = raw_rows(loader), loader.scale.norm_factor
    assert norm > 1.5  # or folding would do nothing
    with torch.no_grad():
        f = in_training[arch].encode(x / norm) * norm
        reconstruction = in_training[arch](x / norm) * norm
    assert 0 < (f > 0).float().mean() < 0.9
    torch.testing.assert_close(run.sae.encode(x), f, rtol=1e-5, atol=1e-5 * norm)
    torch.testing.assert_close(run.sae(x), reconstruction, rtol=1e-5, atol=1e-5 * norm)
    assert not run.sae.W_enc.requires_grad


@pytest.mark.parametrize("arch", ARCHES)
def test_saelens_reads_the_same_sae(arch, trained, loader):
    """Its encode and decode, stated in numpy on the saved tensors, for the architecture that cfg.json names."""
    out, _ = trained
    folder = out / arch
    cfg = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    x = raw_rows(loader).numpy()
    inputs = x - w["b_dec"] if cfg["apply_b_dec_to_input"] else x
    hidden = inputs @ w["W_enc"] + w["b_enc"]
    features = np.maximum(hidden, 0)
    if cfg["architecture"] == "topk":
        assert cfg["rescale_acts_by_decoder_norm"] is False
        order = np.argsort(-features, axis=1)[:, cfg["k"] :]
        np.put_along_axis(features, order, 0, axis=1)
    elif cfg["architecture"] == "jumprelu":
        features = features * (hidden > w["threshold"])
    else:
        assert cfg["architecture"] == "standard"
    sae = load_run(folder).sae
    np.testing.assert_allclose(sae.encode(torch.from_numpy(x)).numpy(), features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        sae(torch.from_numpy(x)).numpy(), features @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("arch", ARCHES)
def test_every_architecture_learns(arch, trained, loader):
    """After two thousand rows it explains held-out rows far better than where it started."""
    run = load_run(trained[0] / arch)
    start = TrainRun(run_config(arch), 8, 60, select("dense", "cpu"))
    start.start_at(loader.read(0).clean)
    rows = held_out_rows(loader)
    before = measure_held_out(start, rows)["held_out"]["explained_variance"]
    after = run.facts["held_out"]["explained_variance"]
    assert after > 0.4
    assert after > before + 0.2


def test_cfg_json_has_saelens_s_names(trained):
    out, _ = trained
    cfgs = {arch: json.loads((out / arch / "cfg.json").read_text()) for arch in ARCHES}
    assert {arch: cfg["architecture"] for arch, cfg in cfgs.items()} == {
        "standard": "standard",
        "topk": "topk",
        "batchtopk": "jumprelu",
        "matryoshka": "jumprelu",
        "jumprelu": "jumprelu",
    }
    cfg, metadata = cfgs["matryoshka"], cfgs["matryoshka"]["metadata"]
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (8, 32, "float32")
    assert cfg["normalize_activations"] == cfg["reshape_activations"] == "none"
    assert metadata["sae_lens_version"] >= "6.0.0"
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata["hf_hook_name"] == "model.layers.1"
    assert (metadata["model_name"], metadata["dataset_path"]) == ("made-up", "made-up text")
    assert (metadata["context_size"], metadata["prepend_bos"]) == (10, True)
    assert metadata["training_architecture"] == "matryoshka_batchtopk"
    assert metadata["training_architecture_details"] == {"matryoshka_widths": [1, 3, 7, 15, 32]}
    assert cfgs["batchtopk"]["metadata"]["training_architecture_details"] == {}
    assert {arch: cfg["apply_b_dec_to_input"] for arch, cfg in cfgs.items()} == dict.fromkeys(ARCHES, True) | {
        "jumprelu": False
    }
    assert cfgs["topk"]["k"] == 3
    assert "k" not in cfgs["batchtopk"]


def test_tensors_have_saelens_s_names_and_shapes(trained):
    out, _ = trained
    common = {"W_enc": (8, 32), "b_enc": (32,), "W_dec": (32, 8), "b_dec": (8,)}
    for arch in ARCHES:
        tensors = load_file(out / arch / "sae_weights.safetensors")
        expected = common if arch in ("standard", "topk") else common | {"threshold": (32,)}
        assert {name: tensor.shape for name, tensor in tensors.items()} == expected
        assert all(tensor.dtype == np.float32 for tensor in tensors.values())
        np.testing.assert_allclose(np.linalg.norm(tensors["W_dec"], axis=1), 1, rtol=1e-5)


def test_prefixes_come_back(trained):
    assert load_run(trained[0] / "matryoshka").sae.prefixes == (1, 3, 7, 15, 32)
    assert load_run(trained[0] / "topk").sae.prefixes == (32,)


def test_folding_scales_thresholds_too(trained):
    sae = trained[1]["jumprelu"]
    folded = fold(sae, 3.0)
    torch.testing.assert_close(folded["threshold"], sae.threshold.detach() * 3)
    torch.testing.assert_close(folded["b_enc"], sae.b_enc.detach() * 3)
    assert folded["W_enc"].equal(sae.W_enc.detach())


def test_run_json_says_what_was_done(trained, loader):
    facts = load_run(trained[0] / "batchtopk").facts
    assert facts["status"] == "complete"
    assert facts["recipe"] == "masked 0.5"
    assert facts["config"] == json.loads(json.dumps(asdict(run_config(masked_fraction=0.5))))
    assert facts["data"] == asdict(DATA)
    assert facts["cache"]["cache_id"] == loader.cache.plan.cache_id
    assert facts["cache"]["path"] == str(loader.cache.path.resolve())
    assert (facts["cache"]["hook"], facts["cache"]["hook_point"], facts["cache"]["model"]) == (
        "layer_1",
        "resid_post.1",
        "made-up",
    )
    assert facts["norm_factor"] == loader.scale.norm_factor
    assert (facts["kernel"], facts["n_steps"], facts["tokens_seen"]) == ("dense", 60, 60 * 32)
    assert {"torch", "python", "numpy"} <= set(facts["versions"])
    assert len(facts["git_commit"]) in (40, 7)


def test_the_first_look_on_held_out_rows_is_right(trained, loader):
    run = load_run(trained[0] / "matryoshka")
    keep = (loader.cache.column("flags", loader.cache.held_out_shards[0]) & 14) == 0
    x = raw_rows(loader)[keep].double()
    sae = run.sae.double()
    f = sae.encode(x)
    explained = 1 - (x - sae.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    assert run.facts["held_out"]["l0"] == pytest.approx((f > 0).double().sum(1).mean().item(), abs=0.1)
    assert run.facts["held_out"]["explained_variance"] == pytest.approx(explained.item(), abs=1e-3)
    assert explained > 0.3


def test_without_held_out_rows_there_is_no_first_look(tmp_path):
    cache = make_training_cache(tmp_path / "cache", n_held_out=0)
    (facts,) = train_sweep(MixedBatchLoader(cache, DATA), [run_config()], out=tmp_path / "runs")
    assert facts["held_out"]["l0"] is None
    assert facts["held_out"]["explained_variance"] is None


def test_what_is_no_finished_run_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        load_run(tmp_path)
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (trained[0] / "topk").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert isinstance(train.load_run(folder), train.TrainedRun)
    weights = (folder / "sae_weights.safetensors").read_bytes()
    for damaged in (weights[: len(weights) // 2], b"", weights[:8] + b"x" * 40):
        (folder / "sae_weights.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_run(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="is damaged"):
        load_run(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_run(folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no status"):
        load_run(folder)
    (folder / "run.json").write_text(json.dumps({"status": "training"}))
    with pytest.raises(UserError, match="--resume"):
        load_run(folder)


def test_a_target_other_than_the_input_is_in_the_label(loader, tmp_path):
    clean = MixedBatchLoader(loader.cache, replace(DATA, target="clean"))
    (facts, plain) = train_sweep(clean, [run_config(corrupt="gaussian=0.4"), run_config("topk")], out=tmp_path)
    assert facts["recipe"] == "gaussian 0.4, clean target"
    assert plain["recipe"] == "unmasked"
