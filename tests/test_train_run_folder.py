"""Run folders: what is saved is what was trained, in raw units, for every architecture; and who may use a folder."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_fixtures import DATA, SCALE, make_training_cache, run_config

import train
from cache_spec import UserError
from train.config import HOW_READ
from train.held_out import held_out_rows, measure_held_out
from train.kernels import select
from train.loader import MixedBatchLoader
from train.names import available
from train.run_folder import hold, load_run, read_facts, write_facts
from train.step import TrainRun
from train.sweep import train_sweep

ROOT = Path(__file__).parent.parent
ARCHES = available("architectures")
SAES = [run_config(arch, masked_fraction=0.5) for arch in ARCHES]
TRANSCODERS = [
    run_config("batchtopk", name="transcoder"),
    run_config("topk", name="skip", skip=True),
    run_config("gated", name="gated_transcoder"),
    run_config("jumprelu", name="jumprelu_skip", skip=True),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("folder") / "cache", layers=(1, 2))


@pytest.fixture(scope="module")
def loader(cache):
    return MixedBatchLoader(cache, DATA)


@pytest.fixture(scope="module")
def trained(loader, tmp_path_factory):
    """The runs' folders, and each SAE as it was in training (its threshold as it was saved)."""
    return train_watched(loader, SAES, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def transcoders(cache, tmp_path_factory):
    loader = MixedBatchLoader(cache, replace(DATA, target_hook="layer_2"))
    return loader, *train_watched(loader, TRANSCODERS, tmp_path_factory.mktemp("transcoders"))


def train_watched(loader, runs, out):
    in_training = {}
    step = TrainRun.step

    def spy(self, x, target, **more):
        in_training[self.config.name] = self.sae
        return step(self, x, target, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainRun, "step", spy)
        train_sweep(loader, runs, out=out)
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
        lengths = in_training[arch].W_dec.norm(dim=1)  # 1, or what a free decoder row grew to: folded into the code
        f = in_training[arch].encode(x / norm) * norm * lengths
        reconstruction = in_training[arch](x / norm) * norm
    assert 0 < (f > 0).float().mean() < 0.9
    torch.testing.assert_close(run.sae.encode(x), f, rtol=1e-5, atol=1e-5 * norm)
    torch.testing.assert_close(run.sae(x), reconstruction, rtol=1e-5, atol=1e-5 * norm)
    assert not run.sae.W_enc.requires_grad


@pytest.mark.parametrize("name", [run.name for run in TRANSCODERS])
def test_a_loaded_transcoder_does_on_raw_rows_what_was_trained_on_normalised_ones(name, transcoders):
    loader, out, in_training = transcoders
    run = load_run(out / name)
    x = raw_rows(loader)
    norm, target_norm = loader.scale.norm_factor, loader.target_scale.norm_factor
    with torch.no_grad():
        f = in_training[name].encode(x / norm) * target_norm
        made = in_training[name](x / norm) * target_norm
    assert 0 < (f > 0).float().mean() < 0.9
    torch.testing.assert_close(run.sae.encode(x), f, rtol=1e-4, atol=1e-5 * target_norm)
    torch.testing.assert_close(run.sae(x), made, rtol=1e-4, atol=1e-5 * target_norm)
    assert run.facts["held_out"]["explained_variance"] is not None


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


def test_run_json_says_what_was_done(trained, loader):
    facts = load_run(trained[0] / "batchtopk").facts
    assert facts["status"] == "complete"
    assert facts["recipe"] == "masked 0.5"
    assert facts["config"] == json.loads(json.dumps(asdict(run_config(masked_fraction=0.5))))
    assert facts["data"] == {name: value for name, value in asdict(DATA).items() if name not in HOW_READ}
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


def test_a_folder_is_held_by_one_process_at_a_time_and_free_again_after(tmp_path):
    folder = tmp_path / "runs" / "run"
    with hold(folder):
        assert (folder / "state").is_dir()
        with pytest.raises(UserError, match="in training by another process now; wait for it"), hold(folder):
            pass
        assert (folder / "state" / "lock").exists()  # whoever was refused deletes nothing
    assert not folder.exists()  # nothing began in it
    with hold(folder):
        (folder / "run.json").write_text("{}")
    assert (folder / "run.json").exists()


def test_a_lock_that_went_with_the_checkpoints_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking the file, whoever held it may have finished and deleted it."""
    opened = os.open

    def late(path, *how):
        fd = opened(path, *how)
        if str(path).endswith("lock") and not seen:
            seen.append(path)
            os.unlink(path)
        return fd

    seen = []
    monkeypatch.setattr(os, "open", late)
    with hold(tmp_path / "run"):
        assert seen
        monkeypatch.undo()
        assert (tmp_path / "run" / "state" / "lock").exists()
        with pytest.raises(UserError, match="another process"), hold(tmp_path / "run"):
            pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from train.run_folder import hold\n"
        "with hold(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process"), hold(folder):
        pass
    process.kill()
    process.communicate()
    with hold(folder):
        pass


def test_no_flipped_bit_of_run_json_is_taken_for_what_was_written(tmp_path):
    """Whether it makes another number, the same number in another spelling (.31 and .30), or another name."""
    facts = {"name": "a", "status": "complete", "norm_factor": 0.31, "n_steps": 10, "more": {"lr": 1e-05, "k": None}}
    write_facts(tmp_path, facts)
    whole = (tmp_path / "run.json").read_bytes()
    for i in range(8 * len(whole)):
        spoiled = bytearray(whole)
        spoiled[i // 8] ^= 1 << i % 8
        (tmp_path / "run.json").write_bytes(spoiled)
        try:
            read = read_facts(tmp_path)
        except UserError:
            continue
        assert read == facts, bytes(spoiled)


def test_a_run_json_spelled_anew_is_read_and_compared(tmp_path):
    facts = {"name": "a", "status": "complete", "norm_factor": 0.31}
    write_facts(tmp_path, facts)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_facts(tmp_path) == facts
    path.write_text(path.read_text().replace("0.31", "0.3"))
    with pytest.raises(UserError, match="delete its line crc32c if the change is yours"):
        read_facts(tmp_path)
    path.write_text(json.dumps(facts))
    assert read_facts(tmp_path) == facts
