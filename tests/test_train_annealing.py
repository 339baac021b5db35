"""p_anneal: when p falls, and that the penalty keeps its size when it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import run_config

from train.annealing import Annealing
from train.kernels import select
from train.penalties.lp import mean_power
from train.step import TrainRun


def make(start: int = 10, n_steps: int = 100, n_updates: int = 10, n_queue: int = 10, p_end: float = 0.2) -> Annealing:
    return Annealing(
        start=start,
        n_steps=n_steps,
        p_end=p_end,
        n_updates=n_updates,
        n_queue=n_queue,
        dtype=torch.float64,
        device="cpu",
    )


def codes(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(16, 20, generator=generator, dtype=torch.float64) * (
        torch.rand(16, 20, generator=generator) < 0.3
    )


def test_p_falls_along_a_line_and_each_move_counts_from_the_step_after_it():
    annealing = make()
    powers = [annealing.p(step) for step in range(100)]
    moves = [10 * i for i in range(1, 10)]  # the tenth would come at step 100
    for i, move in enumerate(moves):
        assert powers[move + 1] == pytest.approx(1 - 0.8 * i / 9)
        assert powers[move] == pytest.approx(1 - 0.8 * max(i - 1, 0) / 9)
    assert powers[:21] == [1.0] * 21
    assert len(set(powers)) == 9
    assert min(powers) > 0.2


def test_the_size_of_the_penalty_stays_when_p_moves():
    """With the same codes again and again: before and after a move it is the same number."""
    annealing, f, sizes = make(), codes(0), []
    for step in range(100):
        sizes.append((annealing.rescale * mean_power(f, annealing.p(step))).item())
        annealing.observe(f, step)
    assert sizes == pytest.approx([sizes[0]] * 100)
    assert annealing.rescale.item() == pytest.approx((mean_power(f, 1) / mean_power(f, annealing.p(99))).item())


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 50), length=st.integers(1, 60), n_updates=st.integers(2, 12), n_queue=st.integers(1, 12))
def test_the_coefficient_follows_the_last_steps_and_no_others(start, length, n_updates, n_queue):
    """Against a list of all pairs, of which each move takes the last ones."""
    n_steps = start + length
    annealing = make(start, n_steps, n_updates, n_queue)
    n = min(n_updates, length + 1)
    moves = [start + i * length // (n - 1) for i in range(n)]
    powers = [1 - 0.8 * i / (n - 1) for i in range(n)]
    pairs, rescale, n_moved = [], 1.0, 0
    for step in range(n_steps):
        f = codes(step)
        assert annealing.p(step) == pytest.approx(powers[max(n_moved, 1) - 1])
        if n_moved:
            pairs.append([mean_power(f, powers[n_moved - 1]).item(), mean_power(f, powers[n_moved]).item()])
        if step == moves[n_moved]:
            if n_moved:
                last = pairs[-n_queue:]
                rescale *= sum(now for now, _ in last) / sum(then for _, then in last)
            n_moved += 1
        annealing.observe(f, step)
        assert annealing.rescale.item() == pytest.approx(rescale)
    assert sorted(set(moves)) == moves


def test_codes_that_are_all_zero_leave_the_coefficient_as_it_is():
    annealing = make()
    for step in range(100):
        annealing.observe(torch.zeros(4, 5, dtype=torch.float64), step)
    assert annealing.rescale == 1


def test_what_was_noted_is_part_of_the_state():
    one, other = make(), make()
    for step in range(37):
        one.observe(codes(step), step)
    other.restore({name: tensor.clone() for name, tensor in one.state().items()})
    for step in range(37, 60):
        one.observe(codes(step), step)
        other.observe(codes(step), step)
    assert one.rescale == other.rescale != 1


def test_only_a_run_whose_penalty_has_a_falling_power_anneals():
    def annealing(arch, **changes):
        return TrainRun(run_config(arch, **changes), 8, 60, select("dense", "cpu")).annealing

    assert annealing("p_anneal") is not None
    assert annealing("standard") is None
    assert annealing("standard", penalties=("lp=0.1",)) is None
    assert annealing("standard", penalties=("lp=0.1",), p_end=0.5) is not None
    assert annealing("p_anneal", penalties=("lp=0",)) is None
