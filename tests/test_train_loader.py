"""The loader: which rows come, that they are the cache's, and that the mixture is exact."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import WIDTHS, make_loader_cache
from train_fixtures import DATA, SCALE, make_training_cache

from cache_spec import CacheError, UserError, ordinary_rows
from train.loader import MixedBatchLoader


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
        keep = ordinary_rows(cache.column("flags", shard))
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


@settings(max_examples=40, deadline=None)
@given(which=st.integers(0, 3), batch_size=st.integers(1, 40), open_shards=st.integers(0, 9), seed=st.integers(0, 3))
def test_an_epoch_reads_every_usable_row_once(caches, which, batch_size, open_shards, seed):
    """Checked against the cache's columns by row number, over two epochs that share a batch."""
    data = replace(DATA, batch_size=batch_size, open_shards=open_shards, seed=seed)
    loader = MixedBatchLoader(caches[which], data, with_masked=False)
    usable = usable_rows(caches[which])
    assert loader.n_rows == len(usable)
    n_steps = -(-2 * len(usable) // batch_size)
    rows = np.concatenate([loader.read(step, with_masked=False).row for step in range(n_steps)])
    for epoch in range(2):
        assert np.sort(rows[epoch * len(usable) : (epoch + 1) * len(usable)]).tolist() == usable.tolist()


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
    assert one.rank.equal(other.rank)


def test_seeds_and_epochs_have_different_orders(caches):
    loader, other = (MixedBatchLoader(caches[2], replace(DATA, seed=seed)) for seed in (0, 1))
    assert (loader.read(0).row != other.read(0).row).any()
    assert (loader.read(0).row != loader.read(loader.n_batches).row).any()
    for step in range(40):
        assert loader.position(step)[0] == step * DATA.batch_size // loader.n_rows


@pytest.mark.parametrize(("positions", "bit"), [("only_masked", True), ("drop_masked", False)])
def test_positions_choose_rows_by_the_mask(cache, positions, bit):
    loader = MixedBatchLoader(cache, replace(DATA, batch_size=16, positions=positions))
    usable = usable_rows(cache, bit)
    assert loader.n_rows == len(usable)
    assert all(np.isin(loader.read(step).row, usable).all() for step in range(loader.n_batches))


def test_what_cannot_be_read_is_refused_in_one_sentence(cache, tmp_path: Path):
    for change, words in (
        ({"positions": "some"}, "--positions some is unknown; it is one of all, drop_masked, only_masked"),
        ({"target": "mask"}, "--target mask is unknown; it is one of self, clean"),
        ({"io": "fast"}, "--io fast is unknown; it is one of auto, mmap, pread"),
        ({"read_ahead": 0}, "--read-ahead 0 is not positive"),
        ({"readers": -1}, "--readers -1 is not positive"),
        ({"n_tokens": 31}, "less than one batch"),
        ({"batch_size": 500, "n_tokens": 1000}, "lower --batch-size"),
        ({"masked_variant": "clean"}, "is the unmasked one"),
        ({"masked_variant": "masked_2"}, "clean, masked, not masked_2; name another with --masked-variant"),
        ({"hook": "layer_7"}, "holds layer_1, not layer_7"),
    ):
        with pytest.raises(UserError, match=words):
            MixedBatchLoader(cache, replace(DATA, **change))
    with pytest.raises(UserError, match="has 0 rows to train on, fewer than one batch"):
        MixedBatchLoader(replace(cache, shards=cache.held_out_shards), DATA)
    plain = make_training_cache(tmp_path / "plain", masked=False)
    MixedBatchLoader(plain, DATA, with_masked=False)
    with pytest.raises(CacheError, match="not masked"):
        MixedBatchLoader(plain, DATA)
    with pytest.raises(CacheError, match="not masked"):
        MixedBatchLoader(plain, replace(DATA, positions="drop_masked"), with_masked=False)


@pytest.fixture(scope="module")
def two_hooks(tmp_path_factory):
    """Layer 1 with 8 dimensions and layer 3 with 6, each with its own scale factor."""
    return make_loader_cache(tmp_path_factory.mktemp("two") / "cache")


def test_a_transcoder_s_target_is_the_same_row_at_the_other_hook_point(two_hooks):
    """Each with its own norm factor, in both variants; the input is what a plain SAE gets."""
    loader = MixedBatchLoader(two_hooks, replace(DATA, target_hook="blocks.3.hook_resid_post"))
    plain = MixedBatchLoader(two_hooks, DATA)
    assert loader.target_hook.name == "layer_3"
    assert (loader.d_out, plain.d_out) == (6, 8)
    assert loader.scale == plain.scale
    assert plain.target_scale is plain.scale
    assert (
        loader.target_scale.norm_factor == MixedBatchLoader(two_hooks, replace(DATA, hook="layer_3")).scale.norm_factor
    )
    assert loader.target_scale.norm_factor != loader.scale.norm_factor
    for step in (0, 5):
        rows, own = loader.read(step), plain.read(step)
        assert own.target_clean is None
        assert rows.clean.equal(own.clean)
        for tensor, variant in ((rows.target_clean, "clean"), (rows.target_masked, "masked")):
            true = two_hooks.read("layer_3", variant, rows.row).astype(np.float64) * WIDTHS[3][1]
            assert tensor is not None
            np.testing.assert_allclose(tensor.numpy(), true / loader.target_scale.norm_factor, rtol=1e-6)


def test_a_denoising_transcoder_does_not_read_masked_targets(two_hooks):
    rows = MixedBatchLoader(two_hooks, replace(DATA, target_hook="layer_3", target="clean")).read(0)
    assert rows.masked is not None
    assert rows.target_clean is not None
    assert rows.target_masked is None


def test_a_target_hook_that_is_no_other_hook_is_refused(cache, two_hooks):
    with pytest.raises(UserError, match=r"--target-hook layer_1 is the input's own .* or name one of layer_3"):
        MixedBatchLoader(two_hooks, replace(DATA, target_hook="layer_1"))
    with pytest.raises(UserError, match=r"leave it out for a plain SAE$"):
        MixedBatchLoader(cache, replace(DATA, target_hook="1"))
    with pytest.raises(CacheError, match="holds layer_1, layer_3, not layer_2"):
        MixedBatchLoader(two_hooks, replace(DATA, target_hook="layer_2"))


def test_rows_know_whether_their_own_token_was_replaced(cache):
    rows = MixedBatchLoader(cache, DATA).read(2)
    mask = np.concatenate([cache.column("mask", shard) for shard in cache.shards])
    assert rows.unreplaced is not None
    assert rows.unreplaced.tolist() == (mask[rows.row] == 0).tolist()
    assert MixedBatchLoader(cache, DATA).read(2, with_masked=False).unreplaced is None
