"""Mixtures: exact shares, the right rows, the same for all runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loader_fixtures import WIDTHS, make_loader_cache
from train_fixtures import DATA

from cache_spec import UserError, derive_seed
from train.loader import MixedBatchLoader
from train.mixing import Batch, Rows, n_masked_rows, rising_steps

FRACTIONS = st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.999, 1.0]) | st.floats(0, 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_loader_cache(tmp_path_factory.mktemp("mixing") / "cache")


@pytest.fixture(scope="module")
def loader(cache):
    return MixedBatchLoader(cache, DATA)


@given(fraction=FRACTIONS, batch_size=st.integers(1, 5000), n_steps=st.integers(1, 50))
def test_the_masked_share_is_exact_over_time(fraction, batch_size, n_steps):
    total = 0
    for step in range(n_steps):
        n = n_masked_rows(fraction, batch_size, step)
        assert math.floor(fraction * batch_size) - 1e-6 <= n <= math.ceil(fraction * batch_size)
        total += n
        assert abs(total - fraction * batch_size * (step + 1)) <= 0.5 + 1e-6


@given(fraction=FRACTIONS, batch_size=st.integers(1, 500), n_rising=st.integers(1, 40), n_steps=st.integers(1, 80))
def test_a_rising_share_is_exact_over_time_too(fraction, batch_size, n_rising, n_steps):
    """The plain sum of the fractions of all steps so far, and no step off by a whole row."""
    total, wanted = 0, 0.0
    for step in range(n_steps):
        now = fraction * min(step / n_rising, 1) * batch_size
        n = n_masked_rows(fraction, batch_size, step, f"linear={n_rising}")
        assert math.floor(now - 1e-6) <= n <= min(math.ceil(now + 1e-6), batch_size)
        total, wanted = total + n, wanted + now
        assert abs(total - wanted) <= 0.5 + 1e-6


def test_a_schedule_that_is_none_is_refused():
    assert rising_steps("constant") == 0
    assert rising_steps("linear=500") == 500
    for text in ("linear", "linear=", "linear=0", "linear=-5", "linear=1.5", "cosine=5", "", "constant=3"):
        with pytest.raises(UserError, match="write constant, or linear=N"):
            rising_steps(text)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "linear=3"])
def test_a_batch_holds_the_cache_s_rows_each_from_the_variant_it_names(cache, loader, fraction, schedule):
    """By row number, against both variants of the cache."""
    for step in range(5):
        batch = loader.read(step).mix(fraction, schedule=schedule)
        assert int(batch.masked.sum()) == n_masked_rows(fraction, 32, step, schedule)
        clean, masked = (cache.read("layer_1", variant, batch.row) for variant in ("clean", "masked"))
        true = np.where(batch.masked.numpy()[:, None], masked, clean).astype(np.float64) * WIDTHS[1][1]
        np.testing.assert_allclose(batch.x.numpy(), true / loader.scale.norm_factor, rtol=1e-6)
        assert batch.target is batch.x
        assert batch.twin is batch.paired is None


@pytest.mark.parametrize("target_hook", ["", "layer_3"])
@pytest.mark.parametrize("target", ["self", "clean"])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_target_is_the_same_token_s_row(cache, target_hook, target, fraction):
    """Of the same variant as the input for self, clean for clean; of the other hook point for a transcoder."""
    loader = MixedBatchLoader(cache, replace(DATA, target=target, target_hook=target_hook))
    rows = loader.read(1)
    batch = rows.mix(fraction, target)
    assert batch.x.equal(MixedBatchLoader(cache, DATA).read(1).mix(fraction).x)
    for i, row in enumerate(batch.row):
        variant = "masked" if target == "self" and batch.masked[i] else "clean"
        stored = cache.read(target_hook or "layer_1", variant, np.array([row]))[0].astype(np.float64)
        true = stored * WIDTHS[3 if target_hook else 1][1]
        np.testing.assert_allclose(batch.target[i].numpy(), true / loader.target_scale.norm_factor, rtol=1e-6)


@given(small=st.floats(0, 1), large=st.floats(0, 1), step=st.integers(0, 100))
def test_a_larger_share_holds_the_rows_of_a_smaller_one(small, large, step):
    small, large = sorted((small, large))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(step))
    rows = Rows(clean=torch.zeros(40, 1), masked=torch.ones(40, 1), row=np.arange(40), step=step, order=order)
    if n_masked_rows(small, 40, step) <= n_masked_rows(large, 40, step):  # rounding may differ by a row
        assert not (rows.mix(small).masked & ~rows.mix(large).masked).any()
    assert rows.mix(large).x[:, 0].bool().equal(rows.mix(large).masked)


def test_which_rows_are_masked_is_drawn_per_step_from_the_seed_alone(cache, loader):
    """The generator is the device's own; the draw on a CPU is written down here."""
    key = derive_seed("train/mix", 0, 6)
    assert loader.read(6).order.equal(torch.randperm(32, generator=torch.Generator().manual_seed(key)))
    assert not loader.read(0).mix(0.5).masked.equal(loader.read(1).mix(0.5).masked)
    other = MixedBatchLoader(cache, replace(DATA, seed=1))
    assert not loader.read(0).order.equal(other.read(0).order)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_twins_are_the_other_view_of_each_row(cache, loader, fraction):
    batch: Batch = loader.read(3).mix(fraction, with_twin=True)
    rows = loader.read(3)
    assert batch.twin is not None
    assert batch.paired is not None
    for i in range(32):
        own, other = (rows.masked, rows.clean) if batch.masked[i] else (rows.clean, rows.masked)
        assert batch.x[i].equal(own[i])
        assert batch.twin[i].equal(other[i])
    mask = np.concatenate([cache.column("mask", shard) for shard in cache.shards])
    assert batch.paired.tolist() == (mask[batch.row] == 0).tolist()
    assert 0 < int(batch.paired.sum()) < 32


def test_runs_of_different_fractions_share_one_read_of_each_row_and_variant(cache):
    loader = MixedBatchLoader(cache, replace(DATA, n_tokens=32 * 4))
    read, seen = loader._reader.read, []

    def count(file, rows, out):
        seen.extend((file, int(row)) for row in rows)
        read(file, rows, out)

    loader._reader.read = count
    n_rows = 0
    with loader.stream(0, 4, with_masked=True) as stream:
        for rows in stream:
            n_rows += len({tuple(rows.mix(fraction).x.flatten().tolist()) for fraction in (0.0, 0.25, 0.5, 1.0)}) // 4
            n_rows += len(rows.row)
    assert n_rows == 4 * 33  # four different mixtures of each read
    assert len(seen) == len(set(seen)) == 2 * 4 * 32
    assert {(hook, variant) for (hook, variant, _), _ in seen} == {("layer_1", "clean"), ("layer_1", "masked")}
    seen.clear()
    with loader.stream(0, 4, with_masked=False) as stream:
        assert len(list(stream)) == 4
    assert {variant for (_, variant, _), _ in seen} == {"clean"}
