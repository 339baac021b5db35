"""One run's state: dead latents, the schedule, penalties and corruptions."""

from dataclasses import replace

import pytest
import torch
from train_fixtures import RUN, run_config

from cache_spec import UserError
from train.kernels import select
from train.names import find
from train.step import TrainRun, learning_rate, penalties_of, recipe_of

D_MODEL = 8


def make_run(n_steps: int = 60, **changes) -> TrainRun:
    return TrainRun(run_config(**changes), D_MODEL, n_steps, select("dense", "cpu"))


def batch(seed: int, n: int = 32) -> torch.Tensor:
    x = torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)).relu() + 0.2
    return x / x.square().sum(1).mean().sqrt()


def test_matryoshka_with_one_prefix_is_batchtopk_to_the_bit(monkeypatch):
    """Weights, threshold and counters after steps in which AuxK is at work."""
    plain = make_run(dead_tokens=64)
    module = find("architectures", "matryoshka")
    monkeypatch.setattr(module, "matryoshka", lambda d_sae, k: replace(recipe_of(run_config()), prefixes=(d_sae,)))
    nested = make_run(arch="matryoshka", dead_tokens=64)
    for run in (plain, nested):
        run.start_at(batch(0))
        for seed in range(30):
            run.step(batch(seed), batch(seed))
    assert plain.dead().any()
    ours, theirs = plain.state(), nested.state()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_five_prefixes_train_another_sae():
    plain, nested = make_run(), make_run(arch="matryoshka")
    assert nested.sae.W_dec.equal(plain.sae.W_dec)
    for run in (plain, nested):
        run.start_at(batch(0))
        for seed in range(3):
            run.step(batch(seed), batch(seed))
    assert not nested.sae.W_dec.equal(plain.sae.W_dec)


def test_the_device_is_asked_for_dead_latents_only_when_there_can_be_one(monkeypatch):
    """The latents found dead are those that a count at every step finds, and most steps ask nothing."""
    run = make_run(dead_tokens=160)
    run.start_at(batch(0))
    asked, found = [], []
    original = torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda self: asked.append(run.n_done) or original(self))
    count = run._count_silence
    silent = torch.zeros(32, dtype=torch.int64)

    def checked(f):
        nonlocal silent
        dead = count(f)
        silent = torch.where((f > 0).any(0), 0, silent + len(f))
        assert (dead is not None) == bool((silent >= 160).any())
        if dead is not None:
            assert dead.equal((silent >= 160).nonzero().squeeze(1))
            found.append(run.n_done)
        return dead

    monkeypatch.setattr(run, "_count_silence", checked)
    for seed in range(40):
        run.step(batch(seed), batch(seed))
    assert found, "no latent died, so nothing was tested"
    assert asked[0] == 4  # 160 tokens are 5 batches
    assert len(asked) < 40


def test_the_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(RUN, step, 60) / RUN.lr for step in range(60)]
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert rates[5:49] == pytest.approx([1.0] * 44)
    assert rates[48:] == pytest.approx([1 - i / 12 for i in range(12)])
    assert learning_rate(replace(RUN, warmup_steps=0), 0, 60) == RUN.lr


def test_the_decoder_keeps_rows_of_length_one():
    for arch in ("standard", "topk", "matryoshka", "jumprelu"):
        run = make_run(arch=arch)
        run.start_at(batch(0))
        run.step(batch(0), batch(0))
        torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(32))


def test_b_dec_starts_at_the_data_where_the_architecture_says_so():
    for arch, starts in (("batchtopk", True), ("topk", True), ("standard", False), ("jumprelu", False)):
        run = make_run(arch=arch)
        run.start_at(batch(0))
        assert bool(run.sae.b_dec.any()) == starts


def test_penalties_can_be_changed_added_and_switched_off():
    config = run_config("topk", penalties=("auxk=0", "l1=0.5"))
    assert penalties_of(config, recipe_of(config)) == {"auxk": 0.0, "l1": 0.5}
    runs = [make_run(arch="topk", penalties=penalties, sparsity_warmup_steps=0) for penalties in ((), ("l1=0.5",))]
    (_, plain), (forward, with_l1) = (run.step(batch(0), batch(0)) for run in runs)
    assert with_l1.item() == pytest.approx(plain.item() + 0.5 * forward.f.sum(1).mean().item(), rel=1e-6)


def test_l0_is_refused_where_there_are_no_thresholds_to_train():
    run = make_run(penalties=("l0=1",))
    with pytest.raises(UserError, match="jumprelu"):
        run.step(batch(0), batch(0))


def test_a_loss_that_warms_up_starts_without_its_penalty():
    run = make_run(arch="standard", penalties=("l1=100",))
    forward, loss = run.step(batch(0), batch(0))
    assert loss.item() == pytest.approx((batch(0) - forward.reconstructions[0]).square().sum(1).mean().item())
    forward, loss = run.step(batch(0), batch(0))
    assert loss.item() > 1.5 * (batch(0) - forward.reconstructions[0]).square().sum(1).mean().item()


@pytest.mark.parametrize(("name", "strength"), [("gaussian", 0.4), ("dropout", 0.2)])
def test_a_corruption_moves_rows_as_far_as_its_strength_says(name, strength):
    """And `strength_for` is the inverse: the displacement in square, as a share of the rows' mean squared length."""
    module = find("corruptions", name)
    x = batch(0, n=4000)
    moved = getattr(module, name)(x, strength, torch.Generator().manual_seed(77))
    displacement = (moved - x).square().sum(1).mean().item()
    assert displacement == pytest.approx({"gaussian": 0.16, "dropout": 0.25}[name], rel=0.05)
    assert module.strength_for(displacement) == pytest.approx(strength, rel=0.05)
    assert (moved - x).mean(0).abs().max() < 0.05
    assert getattr(module, name)(x, 0.0, torch.Generator()).equal(x)


def test_a_strength_out_of_range_is_refused():
    for name, strength in (("gaussian", -0.1), ("dropout", 1.0), ("dropout", -0.5), ("gaussian", float("nan"))):
        with pytest.raises(UserError, match=name):
            getattr(find("corruptions", name), name)(torch.zeros(1, 1), strength, torch.Generator())
