"""Mixtures: exact shares, the right rows, the same for all runs."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import WIDTHS, make_loader_cache
from train_fixtures import DATA

from cache_spec import UserError, derive_seed
from train.loader import MixedBatchLoader
from train.mixing import Batch, Mixture, Need, Rows, masking_ranks, n_masked_rows, rising_steps

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
    rows = Rows(
        clean=torch.zeros(40, 1),
        masked=torch.ones(40, 1),
        row=np.arange(40),
        step=step,
        rank=torch.from_numpy(masking_ranks([10, 30], step)),
        need=Need(clean_from=0, masked_to=40),
    )
    if n_masked_rows(small, 40, step) <= n_masked_rows(large, 40, step):  # rounding may differ by a row
        assert not (rows.mix(small).masked & ~rows.mix(large).masked).any()
    assert rows.mix(large).x[:, 0].bool().equal(rows.mix(large).masked)


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30), seed=st.integers(0, 2**62), share=st.floats(0, 1))
def test_the_masked_rows_are_the_heads_of_all_segments_each_in_proportion(sizes, seed, share):
    """So they are contiguous in the files, and no shard has a share that differs by more than a row."""
    rank = masking_ranks(sizes, seed)
    n_rows = sum(sizes)
    assert sorted(rank) == list(range(n_rows))
    n_masked = round(share * n_rows)
    heads = []
    for own in np.split(rank, np.cumsum(sizes)[:-1]):
        assert (np.diff(own) > 0).all()
        heads.append(int((own < n_masked).sum()))
    assert sum(heads) == n_masked
    heads = np.array(heads)  # one share fits all to a row: that of segment i is (heads +- 1) / size
    assert ((heads - 1) / sizes).max() <= ((heads + 1) / sizes).min() + 1e-9


def test_segments_of_one_row_are_masked_equally_often():
    n_steps, n_segments = 2000, 12
    often = sum(masking_ranks([1] * n_segments, seed) < 3 for seed in range(n_steps)) / n_steps
    assert np.abs(often - 3 / n_segments).max() < 5 * math.sqrt(0.25 * 0.75 / n_steps)


def test_which_rows_are_masked_is_drawn_per_step_from_the_seed_alone(cache, loader):
    """The same on every device."""
    sizes = [piece.n for piece in loader.schedule.pieces(6)]
    assert loader.read(6).rank.tolist() == masking_ranks(sizes, derive_seed("train/mix", 0, 6)).tolist()
    assert not loader.read(0).mix(0.5).masked.equal(loader.read(1).mix(0.5).masked)
    other = MixedBatchLoader(cache, replace(DATA, seed=1))
    assert not loader.read(0).rank.equal(other.read(0).rank)


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


MIXTURES = st.builds(
    Mixture,
    st.sampled_from([0.0, 0.3, 0.5, 1.0]) | st.floats(0, 1),
    st.sampled_from(["constant", "linear=3"]),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    mixtures=st.frozensets(MIXTURES, min_size=1, max_size=3),
    batch_size=st.integers(1, 40),
    open_shards=st.integers(0, 5),
    positions=st.sampled_from(["all", "drop_masked", "only_masked"]),
    target=st.sampled_from(["self", "clean"]),
    target_hook=st.sampled_from(["", "layer_3"]),
    io=st.sampled_from(["mmap", "pread"]),
)
def test_a_stream_for_some_mixtures_gives_them_the_batches_of_a_plain_read(
    cache, mixtures, batch_size, open_shards, positions, target, target_hook, io
):
    """To the bit, whatever it leaves unread, where usable rows have gaps and at the end of an epoch."""
    data = replace(
        DATA,
        batch_size=batch_size,
        open_shards=open_shards,
        positions=positions,
        target=target,
        target_hook=target_hook,
    )
    plain = MixedBatchLoader(cache, data)
    with MixedBatchLoader(cache, replace(data, io=io)).stream(0, 6, mixtures) as stream:
        for rows in stream:
            whole = plain.read(rows.step)
            assert (rows.row == whole.row).all()
            for fraction, schedule, with_twin in mixtures:
                one, other = (
                    each.mix(fraction, target, schedule=schedule, with_twin=with_twin) for each in (rows, whole)
                )
                for name in ("x", "target", "masked", "twin", "paired"):
                    a, b = getattr(one, name), getattr(other, name)
                    assert (a is b is None) or a.equal(b)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(
    ("fractions", "n_clean", "n_masked"),
    [
        ([0.0], 32, 0),
        ([0.5], 16, 16),
        ([1.0], 0, 32),
        ([0.25], 24, 8),
        ([0.0, 0.5], 32, 16),
        ([0.25, 0.5, 0.75], 24, 24),
    ],
)
def test_no_row_is_read_twice_and_none_in_a_view_that_no_run_takes(cache, io, fractions, n_clean, n_masked):
    """One mixture costs the bytes of one view; several share their reads."""
    loader = MixedBatchLoader(cache, replace(DATA, n_tokens=32 * 4, io=io))
    seen = count_reads(loader)
    with loader.stream(0, 4, frozenset(Mixture(fraction) for fraction in fractions)) as stream:
        for rows in stream:
            assert len({tuple(rows.mix(each).x.flatten().tolist()) for each in fractions}) == len(fractions)
    assert len(seen) == len(set(seen))
    variants = [variant for (_, variant, _), _ in seen]
    assert (variants.count("clean"), variants.count("masked")) == (4 * n_clean, 4 * n_masked)


def test_twins_and_clean_targets_read_what_they_take_and_no_more(cache):
    for mixture, target, target_hook, expected in (
        (Mixture(0.5, with_twin=True), "self", "", {"clean": 32, "masked": 32}),
        (Mixture(0.5), "clean", "", {"clean": 32, "masked": 16}),
        (Mixture(0.5), "self", "layer_3", {"clean": 16, "masked": 16, "target clean": 16, "target masked": 16}),
        (Mixture(0.5), "clean", "layer_3", {"clean": 16, "masked": 16, "target clean": 32}),
    ):
        loader = MixedBatchLoader(cache, replace(DATA, target=target, target_hook=target_hook))
        seen = count_reads(loader)
        with loader.stream(3, 4, {mixture}) as stream:
            next(stream)
        names = Counter(("" if hook == "layer_1" else "target ") + variant for (hook, variant, _), _ in seen)
        assert dict(names) == expected


def test_a_mixture_that_was_not_read_for_is_no_batch(cache, loader):
    with loader.stream(0, 1, {Mixture(0.25), Mixture(0.5)}) as stream:
        rows = next(stream)
    for fraction in (0.25, 0.4, 0.5):
        assert rows.mix(fraction).x.isfinite().all()
    for fraction in (0.0, 0.9):
        with pytest.raises(AssertionError):
            rows.mix(fraction)


def count_reads(loader: MixedBatchLoader) -> list[tuple[tuple[str, str, int], int]]:
    """Every (file, row) that a loader reads from now on."""
    read, seen = loader._reader.read, []

    def count(file, rows, out):
        seen.extend((file, int(row)) for row in rows)
        read(file, rows, out)

    loader._reader.read = count
    return seen
