"""Contestants in processes of their own: taken in turn, and one that goes leaves the others and one sentence."""

from dataclasses import replace

import pytest
import torch
from contest_fixtures import TOY, toy_environment

from benchmarks import contest
from benchmarks.contest import ContestantGone, Entrant, Result, compete, ratio, spread, start
from benchmarks.peers import granary
from benchmarks.peers.job import Unsuitable, made_up_batches, n_dead, threshold_for
from benchmarks.peers.worker import quality, serve
from train.names import available


def entrants(env, *contestants):
    return [Entrant(name=name, job=replace(TOY, contestant=name), env=env) for name in contestants]


def test_every_contestant_has_one_time_a_round_without_the_warm_up(tmp_path):
    env = toy_environment(tmp_path, {})
    results, missing = compete(entrants(env, "one", "other"), rounds=3, steps=1, warm_up=2)
    assert not missing
    assert [result.entrant.name for result in results] == ["one", "other"]
    for result in results:
        assert result.seconds == pytest.approx([1.2, 1.6, 2.0])
        assert result.settings == "as it likes"
        assert result.after == {"fvu": 0.5, "l0": 4.0, "n_dead": 0}


def test_ratios_are_taken_round_by_round():
    slow_moment = Result(entrant=Entrant(name="a", job=TOY), seconds=[2.0, 20.0, 2.0])
    other = Result(entrant=Entrant(name="b", job=TOY), seconds=[1.0, 10.0, 1.0])
    assert spread(other.seconds).high > 5
    assert ratio(slow_moment, other) == contest.Spread(2.0, 2.0, 2.0)
    assert spread([3.0]) == contest.Spread(3.0, 3.0, 3.0)


def test_one_that_dies_or_cannot_gives_one_sentence_and_the_others_go_on(tmp_path):
    env = toy_environment(tmp_path, {})
    results, missing = compete(entrants(env, "mortal", "fit", "unsuited"), rounds=3, steps=1, warm_up=1)
    assert [(result.entrant.name, len(result.seconds)) for result in results] == [("fit", 3)]
    assert missing == [
        "unsuited: it has no topk",
        "mortal: its process ended with code 3 and the words 'RuntimeError: out of breath'",
    ]


def test_an_environment_without_python_is_said(tmp_path):
    with pytest.raises(ContestantGone, match=r"peer: .* is no virtual environment, for it has no bin/python"):
        start(Entrant(name="peer", job=TOY, env=tmp_path))


def test_a_real_worker_trains_and_says_so():
    job = replace(TOY, variant="dense", lr=1e-2)
    (result,), missing = compete([Entrant(name="ours", job=job)], rounds=2, steps=10, warm_up=0, n_threads=1)
    assert not missing
    assert all(seconds > 0 for seconds in result.seconds)
    assert result.versions == {"torch": str(torch.__version__)}
    assert result.after["fvu"] < 0.9 * result.before["fvu"]
    assert result.after["l0"] == job.k


@pytest.mark.parametrize("variant", ["encoder", "five", "copy"])
def test_a_floor_answers_each_order(variant, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.floors.N_COPIED", 1 << 10)
    answers = []
    serve(replace(TOY, contestant="floors", variant=variant, precision="bf16"), ["steps 3", "look"], answers.append)
    hello, steps, look = answers
    assert hello["settings"]
    assert steps["seconds"] > 0
    assert set(look) == {"fvu", "l0", "n_dead"}


def test_what_a_contestant_lacks_is_its_only_answer():
    answers = []
    serve(replace(TOY, contestant="sparsify", arch="jumprelu"), ["steps 1"], answers.append)
    assert answers == [{"unsuitable": "sparsify has no jumprelu"}]


def test_rows_are_the_same_in_every_process_and_of_mean_squared_length_one():
    first, again = made_up_batches(TOY), made_up_batches(TOY)
    assert len(first) == TOY.n_batches
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
        assert a.shape == (TOY.batch, TOY.d_model)
        assert a.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
@pytest.mark.parametrize("kernel", sorted(set(available("kernels")) - {"triton"}))
def test_our_dead_latents_stay_dead_while_the_rest_trains(arch, kernel):
    job = replace(TOY, arch=arch, d_sae=128, variant=kernel, dead=0.25, lr=1e-5)
    batches = made_up_batches(job)
    ours = granary.build(job, batches[0])
    for i in range(12):
        ours.step(batches[i % len(batches)])
    with torch.no_grad():
        codes, _ = ours.look(batches[0])
    assert ours.n_dead() == n_dead(job) == 32
    assert codes[:, -32:].count_nonzero() == 0
    assert codes[:, :-32].count_nonzero() > 0


def test_our_jumprelu_starts_where_l0_is_k():
    job = replace(TOY, arch="jumprelu", variant="dense")
    x = made_up_batches(job)[0]
    assert quality(granary.build(job, x), x)["l0"] == pytest.approx(job.k, abs=0.5)
    pre = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert (pre > threshold_for(pre, 4)).sum() == 4 * 8


def test_a_kernel_that_cannot_is_unsuitable():
    with pytest.raises(Unsuitable, match="there is no kernel 'nonsense'"):
        granary.build(replace(TOY, variant="nonsense"), made_up_batches(TOY)[0])
