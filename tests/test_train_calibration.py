"""Calibration: the threshold of a BatchTopK-like SAE at which the clean L0 is k, with what it was beside it."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import DATA, make_training_cache, run_config

from train.activations import BatchTopK
from train.calibration import calibration_rows, mean_l0, threshold_for_l0
from train.loader import MixedBatchLoader
from train.run_folder import load_run
from train.sae import SparseAutoencoder, initialise
from train.sweep import train_sweep


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("calibration") / "cache"), DATA)


@pytest.fixture(scope="module")
def trained(loader, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated")
    runs = [run_config(arch, masked_fraction=1.0) for arch in ("batchtopk", "matryoshka", "topk", "jumprelu")]
    kept = run_config("batchtopk", name="kept", masked_fraction=1.0, calibrate=False)
    facts = train_sweep(loader, [*runs, kept], out=out)
    return out, {fact["name"]: fact for fact in facts}


def sae_of(seed: int, threshold: float = 0.1) -> SparseAutoencoder:
    sae = SparseAutoencoder(8, 32, BatchTopK(3))
    initialise(sae, seed, entries="normal", norm=1.0)
    assert sae.threshold is not None
    sae.threshold.fill_(threshold)
    return sae


@settings(deadline=None, max_examples=40)
@given(
    k=st.integers(1, 8),
    seed=st.integers(0, 9),
    threshold=st.floats(-1, 2),
    sizes=st.lists(st.integers(1, 40), min_size=2),
)
def test_the_count_is_exact_however_the_rows_are_parted(k, seed, threshold, sizes):
    x = torch.randn(sum(sizes), 8, generator=torch.Generator().manual_seed(seed))
    sae = sae_of(seed, threshold)
    moved = threshold_for_l0(sae, x.split(sizes), k, len(x))
    with torch.no_grad():
        kept = (sae.pre_activations(x) > torch.clamp(moved, min=0)).sum()
    assert kept == k * len(x)
    torch.testing.assert_close(moved, threshold_for_l0(sae_of(seed, 0.5), [x], k, len(x)), rtol=0, atol=1e-6)


def test_an_sae_that_is_never_on_keeps_its_threshold():
    sae = sae_of(0)
    torch.nn.init.constant_(sae.b_enc, -100.0)
    assert threshold_for_l0(sae, [torch.randn(10, 8)], 3, 10) == sae.threshold


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_clean_l0_is_k_and_what_training_had_stands_beside_it(arch, trained, loader):
    out, facts = trained
    fact = facts[arch]["calibration"]
    assert fact["clean_l0"] == pytest.approx(3, abs=0.02)
    assert abs(fact["clean_l0_at_training_threshold"] - 3) > 0.05  # trained on masked rows: there was something to do
    assert fact["threshold"] != fact["training_threshold"]
    assert facts[arch]["training_l0"] == json.loads((out / arch / "log.jsonl").read_text().splitlines()[-1])["l0"]
    assert fact["rows"] == "train, clean"
    rows = calibration_rows(loader)
    assert fact["n_rows"] == sum(map(len, rows))
    saved = load_run(out / arch).sae
    assert saved.threshold is not None
    torch.testing.assert_close(saved.threshold, torch.full((32,), fact["threshold"]))
    raw = [x * loader.scale.norm_factor for x in rows]
    assert mean_l0(saved, raw) == pytest.approx(fact["clean_l0"], abs=0.02)
    saved.threshold.fill_(fact["training_threshold"])
    assert mean_l0(saved, raw) == pytest.approx(fact["clean_l0_at_training_threshold"], abs=0.02)


def test_without_calibration_the_average_of_training_is_saved(trained):
    out, facts = trained
    assert facts["kept"]["calibration"] is None
    saved = load_run(out / "kept").sae
    assert saved.threshold is not None
    expected = facts["batchtopk"]["calibration"]["training_threshold"]
    torch.testing.assert_close(saved.threshold, torch.full((32,), expected))


def test_other_activations_are_left_as_they_are(trained):
    _, facts = trained
    assert facts["topk"]["calibration"] is None
    assert facts["jumprelu"]["calibration"] is None


def test_the_rows_are_clean_and_for_training_only(loader):
    rows = torch.cat(calibration_rows(loader))
    assert len(rows) <= loader.n_rows
    read = torch.cat([loader.read(step, with_masked=False).clean for step in range(loader.n_batches)])
    assert rows.equal(read[: len(rows)])
    few = MixedBatchLoader(loader.cache, replace(DATA, batch_size=100))
    assert len(torch.cat(calibration_rows(few))) == few.n_batches * 100
