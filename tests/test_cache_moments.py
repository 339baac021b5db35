"""Moments: what is merged from the shards is what one pass over all ordinary rows would give."""

import dataclasses

import numpy as np
import pytest
import zarr
from cache_fixtures import make_cache, make_hook, make_plan, make_shard, scratch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import (
    FLAG_BOS,
    FLAG_PAD,
    FLAG_SPECIAL,
    FLAG_VALID,
    ActivationCache,
    CacheDamaged,
    CacheError,
    create_cache,
    finalize_cache,
    write_shard,
)
from cache_spec.moments import merge, moments_of, widen

ORDINARY = FLAG_VALID
NOT_ORDINARY = (0, FLAG_VALID | FLAG_BOS, FLAG_VALID | FLAG_SPECIAL, FLAG_PAD, FLAG_VALID | FLAG_BOS | FLAG_SPECIAL)


def plain(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and m2, the slow and obvious way."""
    mean = rows.astype(np.float64).mean(0)
    return mean, ((rows.astype(np.float64) - mean) ** 2).sum(0)


def make_rows(seed: int, n: int, d_model: int, offset: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d_model)) * rng.uniform(0.01, 3, d_model)
    rows[:, 0] += offset  # like the one dimension of a residual stream that dwarfs the others
    return rows.astype("<f2")


def test_every_fp16_number_is_widened_exactly():
    every = np.arange(2**16, dtype=np.uint16).view("<f2")
    finite = every[np.isfinite(every)]
    assert np.array_equal(widen(finite), finite.astype(np.float32))
    assert np.array_equal(np.signbit(widen(finite)), np.signbit(finite))


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 80),
    d_model=st.integers(1, 9),
    offset=st.sampled_from([0.0, 500.0, -3e4]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    at_once=st.integers(1, 90),
)
def test_moments_are_those_of_the_ordinary_rows(seed, n, d_model, offset, share, at_once):
    rows = make_rows(seed, n, d_model, offset)
    ordinary = np.random.default_rng(seed).random(n) >= share
    found = moments_of(rows, ordinary, at_once)
    assert found.n == ordinary.sum()
    if not found.n:
        assert np.isnan(found.mean).all()
        assert np.isnan(found.m2).all()
        assert np.isnan(found.mean_square_norm)
        return
    mean, m2 = plain(rows[ordinary])
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-6 * np.abs(rows).max())
    np.testing.assert_allclose(found.m2, m2, rtol=1e-4, atol=1e-9 * float(np.square(rows.astype(float)).sum()))
    norms = np.square(rows[ordinary].astype(np.float64)).sum(1).mean()
    np.testing.assert_allclose(found.mean_square_norm, norms, rtol=1e-5)


@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 100))
def test_it_does_not_matter_how_rows_are_cut_into_parts(cuts, seed):
    rows = make_rows(seed, 60, 4, 800.0)
    parts = np.split(rows, sorted(cuts))
    merged = merge([moments_of(part, np.ones(len(part), bool)) for part in parts if len(part)], 4)
    mean, m2 = plain(rows)
    assert merged.n == 60
    np.testing.assert_allclose(merged.mean, mean, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(merged.m2, m2, rtol=1e-4)


@given(seed=st.integers(0, 100), n_rows=st.integers(1, 150), scale_factor=st.sampled_from([1.0, 16.0]))
@settings(max_examples=25)
def test_a_cache_knows_the_moments_of_its_rows_in_true_units(seed, n_rows, scale_factor):
    plan = make_plan(n_rows=n_rows, seed=seed)
    plan = dataclasses.replace(plan, hooks=(make_hook(1, 6, scale_factor),))
    rng = np.random.default_rng(seed)
    flags = rng.choice([ORDINARY, ORDINARY, *NOT_ORDINARY], size=n_rows).astype(np.uint8)
    with scratch() as folder:
        create_cache(folder, plan)
        for shard in range(plan.n_shards):
            activations, columns = make_shard(plan, shard)
            first = shard * plan.shard_rows
            columns["flags"] = flags[first : first + plan.rows_in(shard)]
            write_shard(folder, plan, shard, activations, columns)
        finalize_cache(folder)
        cache = ActivationCache.open(folder)
        for variant in ("clean", "masked"):
            rows = cache.read("1", variant, np.arange(n_rows)).astype(np.float64) * scale_factor
            found = cache.moments("layer_1", variant)
            assert found.n == (flags == ORDINARY).sum()
            if found.n:
                mean, m2 = plain(rows[flags == ORDINARY])
                np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-5 * scale_factor)
                np.testing.assert_allclose(found.m2, m2, rtol=1e-4, atol=1e-6 * scale_factor**2)
            some = cache.moments("layer_1", variant, [0])
            assert some.n == (flags[: plan.rows_in(0)] == ORDINARY).sum()


def test_any_zarr_reader_sees_them(tmp_path):
    path = make_cache(tmp_path / "cache", make_plan())
    cache = ActivationCache.open(path)
    stored: np.ndarray = zarr.open(path, mode="r")["layer_1/masked_mean"][...]  # pyright: ignore[reportAssignmentType, reportIndexIssue, reportArgumentType, reportCallIssue]
    assert stored.shape == (3, 6)
    for shard in range(3):
        assert np.array_equal(stored[shard], cache.moments("layer_1", "masked", [shard]).mean, equal_nan=True)


def test_a_changed_file_of_moments_is_refused(tmp_path):
    path = make_cache(tmp_path / "cache", make_plan())
    file = path / "layer_1/clean_m2/c/1/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    cache = ActivationCache.open(path)
    cache.moments("layer_1", "clean", [0, 2])
    with pytest.raises(CacheDamaged, match="clean_m2/c/1/0"):
        cache.moments("layer_1", "clean")


def test_a_cache_of_format_1_0_has_none_and_says_so(tmp_path):
    path = make_cache(tmp_path / "cache", dataclasses.replace(make_plan(), spec_version="1.0"))
    cache = ActivationCache.open(path)
    assert cache.read("1", "clean", np.arange(3)).shape == (3, 6)
    with pytest.raises(CacheError, match=r"format 1\.0, which has no moments"):
        cache.moments("1", "clean")


@pytest.mark.parametrize("name", ["masked_mean", "masked_m2"])
def test_no_variant_may_have_the_name_of_a_moment(name):
    plan = make_plan()
    variant = dataclasses.replace(plan.variants[1], name=name)
    with pytest.raises(ValueError, match=name):
        create_cache("nowhere", dataclasses.replace(plan, variants=(plan.variants[0], variant)))
