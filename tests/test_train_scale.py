"""Scale and matched controls: what a strength means on real rows."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loader_fixtures import make_loader_cache
from train_fixtures import DATA, SCALE, make_training_cache, run_config

from cache_spec import ActivationCache, UserError, ordinary_rows
from cache_spec.layout import activation_file
from train.held_out import MAX_ROWS, held_out_rows, held_out_targets, measure_held_out
from train.loader import MixedBatchLoader
from train.names import find, parse_setting
from train.parallel.axis import ALONE
from train.scale import SamplePart, Scale, matched_corruption, measure, recipe_label


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    cache = make_training_cache(tmp_path_factory.mktemp("scale") / "cache", n_train=2048, n_held_out=128)
    return MixedBatchLoader(cache, replace(DATA, batch_size=256, n_tokens=256 * 20))


def usable(loader, variant: str) -> torch.Tensor:
    """All rows to train on, in training units, from the cache itself."""
    rows = []
    for shard in loader.shards:
        keep = ordinary_rows(loader.cache.column("flags", shard))
        rows.append(loader.cache.activations("layer_1", variant, shard)[keep].astype(np.float64))
    return torch.from_numpy(np.concatenate(rows) * SCALE / loader.scale.norm_factor)


@pytest.mark.parametrize("name", ["gaussian", "dropout"])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_a_matched_corruption_moves_the_cache_s_rows_as_far_as_masking_does(loader, name, fraction):
    """The expected displacement, over all rows of the cache, to five digits; the noise itself over many draws."""
    clean, masked = usable(loader, "clean"), usable(loader, "masked")
    wanted = fraction * (masked - clean).square().sum(1).mean().item()
    strength = parse_setting(matched_corruption(name, fraction, loader.scale), "corruption")[1]
    length = clean.square().sum(1).mean().item()
    assert (strength**2 if name == "gaussian" else strength / (1 - strength) * length) == pytest.approx(
        wanted, rel=1e-4
    )
    generator, apply = torch.Generator().manual_seed(5), getattr(find("corruptions", name), name)
    x = clean.float()
    moved = [(apply(x, strength, generator) - x).square().sum(1).mean().item() for _ in range(40)]
    assert np.mean(moved) == pytest.approx(wanted, rel=0.02)


def test_mixing_moves_rows_as_far_as_the_scale_says(loader):
    """Over an epoch every row comes once, masked with the fraction's chance."""
    by_mixing = 0.0
    for step in range(loader.n_batches):
        rows = loader.read(step)
        by_mixing += (rows.mix(0.25).x - rows.clean).square().sum(1).mean().item() / loader.n_batches
    assert by_mixing == pytest.approx(0.25 * loader.scale.displacement, rel=0.15)


def test_the_scale_is_that_of_the_rows_it_is_given_however_they_are_parted():
    clean = torch.tensor([[3.0, 4.0], [0.0, 5.0], [1.0, 1.0], [2.0, 7.0]])
    masked = clean + torch.tensor([1.0, 0.0])
    length = clean.square().sum(1).double().mean().item()
    scale = measure([SamplePart(clean=clean, masked=masked, where="")])
    assert scale == Scale(norm_factor=length**0.5, displacement=1 / length)
    parts = [SamplePart(clean=clean[i : i + 1], masked=masked[i : i + 1], where="") for i in range(4)]
    assert measure(parts) == scale
    assert measure([SamplePart(clean=clean, masked=None, where="")]).displacement is None
    with pytest.raises(UserError, match="all rows of this hook point are zero"):
        measure([SamplePart(clean=torch.zeros(3, 2), masked=None, where="")])


def test_the_norm_factor_is_of_all_rows_by_the_cache_s_moments_and_of_the_sample_where_they_do_not_fit(
    tmp_path, monkeypatch
):
    """A sample of four rows a shard is told from all rows; replaced tokens, which moments count, are not left out."""
    cache = make_loader_cache(tmp_path / "cache")
    monkeypatch.setattr("train.loader.SAMPLE_ROWS", 4 * len(cache.train_shards))
    exact, whole = [], []
    for shard in cache.train_shards:
        keep = ordinary_rows(cache.column("flags", shard))
        rows = cache.activations("layer_1", "clean", shard).astype(np.float64) * cache.hook("1").scale_factor
        exact.append((rows[keep] ** 2).sum(1))
        unreplaced = keep & ((cache.column("mask", shard) & 1) == 0)
        whole.append((rows[unreplaced] ** 2).sum(1)[:4])
    found = MixedBatchLoader(cache, DATA).scale.norm_factor
    assert found == pytest.approx(np.concatenate(exact).mean() ** 0.5, rel=1e-6)
    dropped = MixedBatchLoader(cache, replace(DATA, positions="drop_masked", batch_size=8)).scale.norm_factor
    assert dropped == pytest.approx(np.concatenate(whole).mean() ** 0.5, rel=1e-6)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("variant", "shard"), [("clean", 0), ("masked", 2), ("clean", 3)])
def test_a_value_that_is_no_number_is_refused_even_unchecked(tmp_path, io, value, variant, shard):
    """The sentence names the hook point and the shard; shard 3 is held out."""
    cache = make_loader_cache(tmp_path / "cache")
    row = int(np.flatnonzero(ordinary_rows(cache.column("flags", shard)))[5])
    with (cache.path / activation_file("layer_3", variant, shard)).open("r+b") as file:
        file.seek(2 * (6 * row + 4))
        file.write(np.array([value], "<f2").tobytes())
    unchecked = ActivationCache.open(cache.path, check=False)
    data = replace(DATA, hook="layer_3", io=io)
    with pytest.raises(
        UserError, match=f"layer_3 in (held-out )?shard {shard} of .* NaN or infinity in 1 of"
    ) as caught:
        held_out_rows(MixedBatchLoader(unchecked, data))
    assert "python -m cache_spec verify" in str(caught.value)
    held_out_rows(MixedBatchLoader(unchecked, DATA))  # the other hook point is sound


def test_a_transcoder_s_held_out_targets_are_the_same_rows_at_the_other_hook_point(tmp_path):
    cache = make_loader_cache(tmp_path / "cache")
    loader = MixedBatchLoader(cache, replace(DATA, target_hook="layer_3"))
    rows, targets = held_out_rows(loader), held_out_targets(loader)
    (shard,) = cache.held_out_shards
    keep = ordinary_rows(cache.column("flags", shard))
    assert rows is not None
    assert targets is not None
    for found, name, scale in ((rows, "layer_1", loader.scale), (targets, "layer_3", loader.target_scale)):
        true = cache.activations(name, "clean", shard)[keep].astype(np.float64) * cache.hook(name).scale_factor
        np.testing.assert_allclose(found.numpy(), true / scale.norm_factor, rtol=1e-5)
    assert held_out_targets(MixedBatchLoader(cache, DATA)) is None


@pytest.mark.parametrize("transcoder", [False, True])
def test_held_out_explained_variance_is_that_of_what_is_reconstructed(transcoder):
    """Of a made-up SAE that gives back half of each row; two of its four codes are active."""
    rows = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    targets = rows[:, :2] * 3 + 1 if transcoder else None
    sae = SimpleNamespace(
        encode=lambda x: torch.tensor([0.0, 1.0, 2.0, 0.0]).expand(len(x), 4),
        decode=lambda f, x: x[:, :2] * 2 if transcoder else x / 2,
    )
    run: Any = SimpleNamespace(sae=sae, spread=ALONE, dead=lambda: torch.tensor([True, False, False, True]))
    held_out = measure_held_out(run, rows, targets)["held_out"]
    goal = rows if targets is None else targets
    error = (rows[:, :2] + 1).square().sum() if transcoder else (rows / 2).square().sum()
    explained = 1 - error / (goal - goal.mean(0)).square().sum()
    assert held_out == {"l0": 2.0, "explained_variance": pytest.approx(explained.item(), rel=1e-5), "n_dead": 2}
    assert measure_held_out(run, None)["held_out"] == {"l0": None, "explained_variance": None, "n_dead": 2}


def test_normalised_rows_have_mean_squared_length_one(loader):
    lengths = torch.cat([loader.read(step).clean.square().sum(1) for step in range(loader.n_batches)])
    assert lengths.mean().item() == pytest.approx(1, rel=0.02)


def test_labels_are_what_a_person_would_call_a_run():
    cases: list[tuple[dict, str, str]] = [
        ({}, "self", "unmasked"),
        ({}, "clean", "unmasked"),
        ({"masked_fraction": 0.5}, "self", "masked 0.5"),
        ({"masked_fraction": 0.5}, "clean", "masked 0.5, clean target"),
        ({"corrupt": "gaussian=0.412345", "matched_fraction": 0.5}, "self", "gaussian 0.412 (matched 0.5)"),
        ({"corrupt": "dropout=0.2", "masked_fraction": 0.25}, "self", "masked 0.25, dropout 0.2"),
    ]
    for changes, target, label in cases:
        assert recipe_label(run_config(**changes), replace(DATA, target=target)) == label


def test_another_variant_is_in_the_label():
    data = replace(DATA, masked_variant="random")
    assert recipe_label(run_config(masked_fraction=0.5), data) == "random 0.5"
    noisy = run_config(corrupt="gaussian=0.4", matched_fraction=0.5)
    assert recipe_label(noisy, data) == "gaussian 0.4 (matched random 0.5)"


def test_whatever_else_makes_a_recipe_is_in_the_label():
    cases: list[tuple[dict, dict, str]] = [
        ({"masked_fraction": 0.5, "masked_schedule": "linear=1000"}, {}, "masked 0.5 over 1000 steps"),
        ({"consistency": 0.1}, {}, "consistency 0.1"),
        (
            {"masked_fraction": 0.3, "consistency": 0.1},
            {"target": "clean"},
            "masked 0.3, clean target, consistency 0.1",
        ),
        ({}, {"target_hook": "layer_13"}, "unmasked, to layer_13"),
        ({"skip": True}, {"target_hook": "layer_13"}, "unmasked, to layer_13, skip"),
    ]
    for changes, data, label in cases:
        assert recipe_label(run_config(**changes), replace(DATA, **data)) == label


def test_held_out_rows_are_normalised_clean_and_without_first_tokens(loader):
    rows = held_out_rows(loader)
    assert rows is not None
    expected = []
    for shard in loader.cache.held_out_shards:
        keep = ordinary_rows(loader.cache.column("flags", shard))
        expected.append(loader.cache.activations("layer_1", "clean", shard)[keep].astype(np.float64))
    true = np.concatenate(expected) * SCALE / loader.scale.norm_factor
    assert len(true) < MAX_ROWS
    np.testing.assert_allclose(rows.numpy(), true, rtol=1e-5)
