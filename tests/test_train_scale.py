"""Scale and matched controls: what a strength means on real rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from train_fixtures import DATA, SCALE, make_training_cache, run_config

from cache_spec import UserError
from train.held_out import MAX_ROWS, held_out_rows
from train.loader import SKIPPED, MixedBatchLoader
from train.names import find, parse_setting
from train.report import keep_freed_memory, memory_bytes, print_results
from train.scale import Scale, matched_corruption, measure, recipe_label


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    cache = make_training_cache(tmp_path_factory.mktemp("scale") / "cache", n_train=2048, n_held_out=128)
    return MixedBatchLoader(cache, replace(DATA, batch_size=256, n_tokens=256 * 20))


@pytest.mark.parametrize("name", ["gaussian", "dropout"])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_a_matched_corruption_moves_rows_as_far_as_the_mixture_does(loader, name, fraction):
    """Measured on the batches themselves, mixture against corruption."""
    matched = matched_corruption(name, fraction, loader.scale)
    strength = parse_setting(matched, "corruption")[1]
    by_mixing = by_corruption = 0.0
    generator = torch.Generator().manual_seed(5)
    for step in range(loader.n_batches):
        rows = loader.read(step)
        by_mixing += (rows.mix(fraction).x - rows.clean).square().sum().item()
        moved = getattr(find("corruptions", name), name)(rows.clean, strength, generator)
        by_corruption += (moved - rows.clean).square().sum().item()
    assert by_mixing > 0
    assert by_corruption == pytest.approx(by_mixing, rel=0.1)


def test_the_scale_is_that_of_the_rows_it_is_given():
    clean = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    scale = measure(clean, clean + torch.tensor([1.0, 0.0]))
    assert scale == Scale(norm_factor=5.0, displacement=1 / 25)
    assert measure(clean, None).displacement is None
    with pytest.raises(UserError, match="all rows of this hook point are zero"):
        measure(torch.zeros(3, 2), None)


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


def test_held_out_rows_are_normalised_clean_and_without_first_tokens(loader):
    rows = held_out_rows(loader)
    assert rows is not None
    expected = []
    for shard in loader.cache.held_out_shards:
        keep = (loader.cache.column("flags", shard) & SKIPPED) == 0
        expected.append(loader.cache.activations("layer_1", "clean", shard)[keep].astype(np.float64))
    true = np.concatenate(expected) * SCALE / loader.scale.norm_factor
    assert len(true) < MAX_ROWS
    np.testing.assert_allclose(rows.numpy(), true, rtol=1e-5)


def test_the_memory_that_is_announced_grows_with_what_needs_it(loader):
    small, large = run_config(d_sae=32), run_config(d_sae=3200)
    assert memory_bytes(loader, [large], 1) > 10 * memory_bytes(loader, [small], 1)
    assert memory_bytes(loader, [small] * 5, 1) > memory_bytes(loader, [small], 1)
    parameters = 2 * 8 * 3200 + 3200 + 8
    assert memory_bytes(loader, [large], 1) > 16 * parameters


def test_a_run_without_held_out_rows_has_a_line_in_the_table_too(capsys, tmp_path):
    seen = {"l0": 3.14159, "explained_variance": 0.5, "n_dead": 2}
    unseen = {"l0": None, "explained_variance": None, "n_dead": 0}
    print_results([{"name": "a", "held_out": seen}, {"name": "bb", "held_out": unseen}], tmp_path)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[1].split()[:4] == ["a", "3.14", "0.5000", "2"]
    assert lines[2].split()[:4] == ["bb", "-", "-", "0"]


def test_keeping_freed_memory_changes_no_result():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = x @ x
    keep_freed_memory()
    assert (x @ x).equal(before)
