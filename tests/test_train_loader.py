"""The loader: which rows come, that they are the cache's, and that the mixture is exact."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import DATA, SCALE, make_training_cache

from cache_spec import CacheError, UserError
from train.loader import SKIPPED, MixedBatchLoader, n_masked_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("loader") / "cache")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of one short shard, of one shard, and of several whose last is short."""
    folder = tmp_path_factory.mktemp("caches")
    return [
        make_training_cache(folder / str(i), n_train=n, n_held_out=n_held, seed=i)
        for i, (n, n_held) in enumerate([(48, 0), (64, 16), (320, 40), (200, 0)])
    ]


def usable_rows(cache, variant_bit=None) -> np.ndarray:
    rows = []
    for shard in cache.train_shards:
        keep = (cache.column("flags", shard) & SKIPPED) == 0
        if variant_bit is not None:
            keep &= ((cache.column("mask", shard) & 1) != 0) == variant_bit
        rows.append(np.flatnonzero(keep) + shard * cache.plan.shard_rows)
    return np.concatenate(rows)


def test_rows_are_the_cache_s_rows_over_the_norm_factor(cache):
    loader = MixedBatchLoader(cache, DATA)
    for step in (0, 1, 7):
        rows = loader.read(step)
        for tensor, variant in ((rows.clean, "clean"), (rows.masked, "masked")):
            true = cache.read("layer_1", variant, rows.row).astype(np.float64) * SCALE
            assert tensor is not None
            np.testing.assert_allclose(tensor.numpy(), true / loader.scale.norm_factor, rtol=1e-6)


def test_the_norm_factor_is_that_of_the_usable_clean_train_rows(cache):
    loader = MixedBatchLoader(cache, DATA)
    rows = usable_rows(cache)
    clean = cache.read("layer_1", "clean", rows).astype(np.float64) * SCALE
    masked = cache.read("layer_1", "masked", rows).astype(np.float64) * SCALE
    mean_square = (clean**2).sum(1).mean()
    assert loader.scale.norm_factor == pytest.approx(math.sqrt(mean_square), rel=1e-6)
    assert loader.scale.displacement == pytest.approx(((masked - clean) ** 2).sum(1).mean() / mean_square, rel=1e-5)
    assert replace(loader.scale) == MixedBatchLoader(cache, replace(DATA, seed=5)).scale


@settings(max_examples=60, deadline=None)
@given(which=st.integers(0, 3), batch_size=st.integers(1, 40), open_shards=st.integers(0, 9), seed=st.integers(0, 3))
def test_an_epoch_reads_no_row_twice_and_leaves_out_less_than_a_batch(caches, which, batch_size, open_shards, seed):
    cache = caches[which]
    data = replace(DATA, batch_size=batch_size, open_shards=open_shards, seed=seed)
    loader = MixedBatchLoader(cache, data, with_masked=False)
    usable = usable_rows(cache)
    assert loader.n_rows == len(usable)
    assert loader.n_batches == len(usable) // batch_size
    for epoch in range(2):
        steps = range(epoch * loader.n_batches, (epoch + 1) * loader.n_batches)
        rows = np.concatenate([loader.read(step, with_masked=False).row for step in steps])
        assert len(rows) == loader.n_batches * batch_size
        assert len(np.unique(rows)) == len(rows)
        assert np.isin(rows, usable).all()


@settings(max_examples=30, deadline=None)
@given(which=st.integers(0, 3), step=st.integers(0, 200), seed=st.integers(0, 3))
def test_a_step_s_rows_depend_on_nothing_but_the_seed_and_the_step(caches, which, step, seed):
    data = replace(DATA, batch_size=16, seed=seed)
    walked = MixedBatchLoader(caches[which], data)
    for earlier in range(step % 7):
        walked.read(earlier)
    one, other = walked.read(step), MixedBatchLoader(caches[which], data).read(step)
    assert (one.row == other.row).all()
    assert one.clean.equal(other.clean)
    assert one.order.equal(other.order)


def test_seeds_and_epochs_have_different_orders(caches):
    loader, other = (MixedBatchLoader(caches[2], replace(DATA, seed=seed)) for seed in (0, 1))
    assert (loader.read(0).row != other.read(0).row).any()
    assert (loader.read(0).row != loader.read(loader.n_batches).row).any()
    assert loader.position(loader.n_batches + 2) == (1, 2)


def test_a_batch_comes_from_as_many_shards_as_are_open(caches):
    data = replace(DATA, batch_size=32, open_shards=4)
    loader = MixedBatchLoader(caches[2], data)
    n_shards = [len(np.unique(loader.read(step).row // 64)) for step in range(loader.n_batches)]
    assert np.mean(n_shards) >= 3
    assert (
        max(len(np.unique(MixedBatchLoader(caches[2], replace(data, open_shards=1)).read(s).row // 64)) for s in (0, 1))
        <= 2
    )


@given(
    fraction=st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.999, 1.0]) | st.floats(0, 1),
    batch_size=st.integers(1, 5000),
    n_steps=st.integers(1, 50),
)
def test_the_masked_share_is_exact_over_time(fraction, batch_size, n_steps):
    total = 0
    for step in range(n_steps):
        n = n_masked_rows(fraction, batch_size, step)
        assert math.floor(fraction * batch_size) - 1e-6 <= n <= math.ceil(fraction * batch_size)
        total += n
        assert abs(total - fraction * batch_size * (step + 1)) <= 0.5 + 1e-6


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_a_mixture_takes_each_row_from_one_variant(cache, fraction):
    loader = MixedBatchLoader(cache, DATA)
    for step in range(4):
        rows = loader.read(step)
        assert rows.masked is not None
        batch = rows.mix(fraction)
        assert int(batch.masked.sum()) == n_masked_rows(fraction, 32, step)
        assert batch.x.equal(torch.stack([rows.masked[i] if m else rows.clean[i] for i, m in enumerate(batch.masked)]))
        assert batch.target is batch.x
        assert rows.mix(fraction, "clean").target.equal(rows.clean)


def test_a_larger_share_holds_the_rows_of_a_smaller_one_and_all_runs_see_the_same_rows(cache):
    rows = MixedBatchLoader(cache, DATA).read(3)
    small, large = rows.mix(0.25), rows.mix(0.5)
    assert (small.row == large.row).all()
    assert not (small.masked & ~large.masked).any()


def test_which_rows_are_masked_changes_from_step_to_step(cache):
    loader = MixedBatchLoader(cache, DATA)
    assert not loader.read(0).mix(0.5).masked.equal(loader.read(1).mix(0.5).masked)


@pytest.mark.parametrize(("positions", "bit"), [("only_masked", True), ("drop_masked", False)])
def test_positions_choose_rows_by_the_mask(cache, positions, bit):
    loader = MixedBatchLoader(cache, replace(DATA, batch_size=16, positions=positions))
    usable = usable_rows(cache, bit)
    assert loader.n_rows == len(usable)
    assert all(np.isin(loader.read(step).row, usable).all() for step in range(loader.n_batches))


def test_what_cannot_be_read_is_refused_in_one_sentence(cache, tmp_path: Path):
    for change, words in (
        ({"positions": "some"}, "only_masked"),
        ({"target": "mask"}, "self, clean"),
        ({"n_tokens": 31}, "less than one batch"),
        ({"batch_size": 500, "n_tokens": 1000}, "lower --batch-size"),
    ):
        with pytest.raises(UserError, match=words):
            MixedBatchLoader(cache, replace(DATA, **change))
    with pytest.raises(CacheError, match="clean, masked, not masked_2"):
        MixedBatchLoader(cache, replace(DATA, masked_variant="masked_2"))
    plain = make_training_cache(tmp_path / "plain", masked=False)
    MixedBatchLoader(plain, DATA, with_masked=False)
    with pytest.raises(CacheError, match="not masked"):
        MixedBatchLoader(plain, DATA)
    with pytest.raises(CacheError, match="not masked"):
        MixedBatchLoader(plain, replace(DATA, positions="drop_masked"), with_masked=False)
