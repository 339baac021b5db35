"""Which rows come when: every row once an epoch, the order a pure function of the seed, epochs announced."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.schedule import RowSchedule, epoch_ended, epochs_ahead

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any)


def rows_of(schedule: RowSchedule, steps: Iterable[int], counts: list[int]) -> np.ndarray:
    """Rows numbered through all shards, in the order they come."""
    before = np.concatenate([[0], np.cumsum(counts)])
    found = []
    for step in steps:
        pieces = schedule.pieces(step)
        assert sum(piece.n for piece in pieces) == schedule.batch_size
        for piece in pieces:
            assert piece.n > 0
            assert piece.first + piece.n <= counts[piece.shard]
            found.append(before[piece.shard] + piece.first + np.arange(piece.n))
    return np.concatenate(found)


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, share=st.floats(0, 1), n_open=st.integers(1, 12), seed=st.integers(0, 3))
def test_every_row_comes_exactly_once_an_epoch(counts, share, n_open, seed):
    """Whatever the batch size, also where batches stand across two epochs."""
    n_rows = sum(counts)
    batch_size = max(1, round(share * n_rows))
    schedule = RowSchedule(np.array(counts), batch_size=batch_size, n_open=n_open, seed=seed)
    n_epochs = 3
    rows = rows_of(schedule, range(-(-n_epochs * n_rows // batch_size)), counts)
    for epoch in range(n_epochs):
        assert np.sort(rows[epoch * n_rows : (epoch + 1) * n_rows]).tolist() == list(range(n_rows))


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, share=st.floats(0, 1), step=st.integers(0, 500), seed=st.integers(0, 3))
def test_a_step_depends_on_nothing_but_seed_and_step(counts, share, step, seed):
    batch_size = max(1, round(share * sum(counts)))
    walked, fresh = (RowSchedule(np.array(counts), batch_size=batch_size, n_open=4, seed=seed) for _ in range(2))
    for other in (3, 0, step + 7, step // 2):
        walked.pieces(other)
    assert walked.pieces(step) == fresh.pieces(step)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, share=st.floats(0, 1))
def test_positions_count_the_batches_that_start_in_each_epoch(counts, share):
    n_rows = sum(counts)
    batch_size = max(1, round(share * n_rows))
    schedule = RowSchedule(np.array(counts), batch_size=batch_size, n_open=2, seed=0)
    before = (0, -1)
    for step in range(3 * n_rows // batch_size + 2):
        epoch, batch = schedule.position(step)
        assert epoch == step * batch_size // n_rows
        assert (epoch, batch) in ((before[0], before[1] + 1), (before[0] + 1, 0))
        before = (epoch, batch)


def test_seeds_epochs_and_shards_have_different_orders():
    counts = [500, 480, 510, 490]
    one, other = (RowSchedule(np.array(counts), batch_size=100, n_open=4, seed=seed) for seed in (0, 1))
    epoch = len(rows_of(one, range(19), counts)) // 100
    assert (rows_of(one, range(epoch), counts) != rows_of(other, range(epoch), counts)).mean() > 0.9
    second = range(20, 20 + epoch)
    assert (rows_of(one, range(epoch), counts) != rows_of(one, second, counts)).mean() > 0.9


@pytest.mark.parametrize(("n_open", "at_least", "at_most"), [(1, 1, 2), (4, 4, 8), (8, 6, 8)])
def test_a_batch_comes_from_as_many_shards_as_are_open(n_open, at_least, at_most):
    schedule = RowSchedule(np.full(8, 1000), batch_size=80, n_open=n_open, seed=0)
    for step in range(99):
        assert at_least <= len({piece.shard for piece in schedule.pieces(step)}) <= at_most


def test_a_stretch_is_read_front_to_back():
    """Consecutive batches go on where the one before stopped, so a disk reads ahead."""
    schedule = RowSchedule(np.full(4, 1000), batch_size=100, n_open=4, seed=0)
    for step in range(1, 39):
        ends = {(piece.shard, (piece.first + piece.n) % 1000) for piece in schedule.pieces(step - 1)}
        went_on = [(piece.shard, piece.first) in ends for piece in schedule.pieces(step)]
        assert sum(went_on) >= 4


def test_epochs_are_announced_before_they_begin():
    assert epochs_ahead(380_928, 380_928) == ""
    assert epochs_ahead(380_928, 600_000) == (
        "the cache has 380,928 rows to train on; 600,000 tokens are 1.58 epochs: rows will be seen up to 2 times"
    )
    assert "3.00 epochs: rows will be seen up to 3 times" in epochs_ahead(1000, 3000)
    assert "up to 4 times" in epochs_ahead(1000, 3001)


@settings(max_examples=50, deadline=None)
@given(n_rows=st.integers(1, 60), share=st.floats(0, 1))
def test_the_end_of_each_epoch_is_said_once_and_not_before_all_its_rows_were_read(n_rows, share):
    batch_size = max(1, round(share * n_rows))
    schedule = RowSchedule(np.array([n_rows]), batch_size=batch_size, n_open=1, seed=0)
    said = {step: text for step in range(200) if (text := epoch_ended(schedule, step))}
    for n_times, (step, text) in enumerate(said.items(), start=1):
        assert (step - 1) * batch_size < n_times * n_rows <= step * batch_size
        assert f"all {n_rows} rows were read {'once' if n_times == 1 else f'{n_times} times'}; again" in text
    assert len(said) == 199 * batch_size // n_rows
