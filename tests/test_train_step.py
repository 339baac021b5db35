"""One run's state: dead latents, the schedule, penalties and corruptions."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from train_fixtures import RUN, WITHOUT_K, run_config

from cache_spec import UserError
from train.activations import JumpReLU
from train.kernels import select
from train.kernels.dense import forward
from train.losses import inconsistency
from train.names import available, find
from train.sae import geometric_median
from train.step import (
    TrainRun,
    learning_rate,
    penalties_of,
    recipe_of,
    try_penalties,
)

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
    count = run.count_silence
    silent = torch.zeros(32, dtype=torch.int64)

    def checked(fired, n_rows):
        nonlocal silent
        dead = count(fired, n_rows)
        silent = torch.where(fired, 0, silent + n_rows)
        assert (dead is not None) == bool((silent >= 160).any())
        if dead is not None:
            assert dead.equal((silent >= 160).nonzero().squeeze(1))
            found.append(run.n_done)
        return dead

    monkeypatch.setattr(run, "count_silence", checked)
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


def trained(n: int, run: TrainRun) -> TrainRun:
    run.start_at(batch(0))
    for seed in range(n):
        run.step(batch(seed), batch(seed))
    return run


@pytest.mark.parametrize("arch", available("architectures"))
def test_the_decoder_keeps_rows_of_length_one_unless_it_is_free(arch):
    lengths = trained(3, make_run(arch=arch)).sae.W_dec.norm(dim=1)
    ones = torch.ones(32)
    assert torch.allclose(lengths, ones) == (arch != "standard_april")
    torch.testing.assert_close(trained(3, make_run(arch=arch, decoder="unit")).sae.W_dec.norm(dim=1), ones)
    assert not torch.allclose(trained(3, make_run(arch=arch, decoder="free")).sae.W_dec.norm(dim=1), ones)


def test_b_dec_starts_at_the_data_where_the_architecture_says_so():
    for arch in available("architectures"):
        run = make_run(arch=arch)
        run.start_at(batch(0))
        assert bool(run.sae.b_dec.any()) == (arch in ("batchtopk", "topk", "matryoshka"))
        starts = {}
        for where in ("zero", "mean", "median"):
            run = make_run(arch=arch, init_b_dec=where)
            run.start_at(batch(0))
            starts[where] = run.sae.b_dec.detach()
        assert not starts["zero"].any()
        torch.testing.assert_close(starts["mean"], batch(0).mean(0))
        torch.testing.assert_close(starts["median"], geometric_median(batch(0)))


def test_what_a_run_changes_of_its_recipe():
    recipe = recipe_of(run_config("jumprelu", beta1=0.5, clip_norm=3.0, bandwidth=0.25, decoder="free"))
    assert (recipe.betas, recipe.clip_norm, recipe.decoder) == ((0.5, 0.999), 3.0, "free")
    assert recipe.activation == JumpReLU(0.25)
    assert recipe_of(run_config("topk", clip_norm=0.0)).clip_norm is None
    assert recipe_of(run_config("topk")).clip_norm == 1
    assert recipe_of(run_config("p_anneal", p_end=0.5)).p_end == 0.5
    unchanged = recipe_of(run_config("matryoshka"))
    assert unchanged == find("architectures", "matryoshka").matryoshka(32, 3)


def test_a_long_gradient_is_shortened():
    """With no momentum and a second moment that forgets nothing, clipping shows in Adam's first moment."""
    lengths = {}
    for clip in (0.0, 0.01):
        run = make_run(arch="topk", beta1=0.0, clip_norm=clip)
        run.start_at(batch(0))
        run.step(10 * batch(0), 10 * batch(0))
        gradients = [state["exp_avg"] for state in run.optimizer.state.values()]
        lengths[clip] = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert lengths[0.01] == pytest.approx(0.01, rel=1e-3)
    assert lengths[0.0] > 1


@pytest.mark.parametrize(
    ("arch", "changes", "word"),
    [
        ("topk", {"k": 0}, "--k 0"),
        ("batchtopk", {"k": 33}, "--k 33"),
        ("topk", {"resample_every": 10}, "--resample-every"),
        ("jumprelu", {"resample_every": 10}, "--resample-every"),
        ("standard", {"resample_every": -1}, "negative"),
        ("p_anneal", {"p_end": 0.0}, "--p-end 0"),
        ("p_anneal", {"p_end": 1.5}, "--p-end 1.5"),
        ("p_anneal", {"p_updates": 1}, "--p-updates 1"),
        ("p_anneal", {"p_queue": 0}, "--p-queue 0"),
        ("topk", {"aux_k": -1}, "--aux-k -1"),
        ("nothing", {}, "there is no architecture"),
        ("matryoshka", {"d_sae": 16}, "at least 32"),
    ],
)
def test_what_an_architecture_cannot_have_is_refused(arch, changes, word):
    with pytest.raises(UserError, match=word):
        recipe_of(run_config(arch, **changes))


@pytest.mark.parametrize(
    ("arch", "penalties", "word"),
    [("topk", ("l0=1",), "jumprelu"), ("standard", ("gate=1",), "gated"), ("topk", ("l1=-1",), "negative")],
)
def test_a_penalty_that_does_not_fit_is_refused(arch, penalties, word):
    config = run_config(arch, penalties=penalties)
    with pytest.raises(UserError, match=word):
        try_penalties(config, recipe_of(config))


@pytest.mark.parametrize("arch", available("architectures"))
def test_an_architecture_s_own_penalties_fit_it(arch):
    config = run_config(arch)
    recipe = recipe_of(config)
    try_penalties(config, recipe)  # refuses one that does not fit
    run = make_run(arch=arch)
    loss = run.step(batch(0), batch(0)).loss
    assert penalties_of(config, recipe)
    assert loss.isfinite()


def test_penalties_can_be_changed_added_and_switched_off():
    config = run_config("topk", penalties=("auxk=0", "l1=0.5"))
    assert penalties_of(config, recipe_of(config)) == {"auxk": 0.0, "l1": 0.5}
    runs = [make_run(arch="topk", penalties=penalties, sparsity_warmup_steps=0) for penalties in ((), ("l1=0.5",))]
    f = forward(runs[0].sae, batch(0)).f
    plain, with_l1 = (run.step(batch(0), batch(0)).loss for run in runs)
    assert with_l1.item() == pytest.approx(plain.item() + 0.5 * f.sum(1).mean().item(), rel=1e-6)


def test_a_loss_that_warms_up_starts_without_its_penalty():
    run = make_run(arch="standard", penalties=("l1=100",))
    first, second = run.step(batch(0), batch(0)), run.step(batch(0), batch(0))
    assert first.loss.item() == pytest.approx((batch(0) - first.reconstruction).square().sum(1).mean().item())
    assert second.loss.item() > 1.5 * (batch(0) - second.reconstruction).square().sum(1).mean().item()


RESUMED = {
    **{arch: {"arch": arch} for arch in available("architectures")},
    **{f"{arch}, resampled": {"arch": arch, "resample_every": 20} for arch in WITHOUT_K},
    "batchtopk, consistent": {"arch": "batchtopk", "consistency": 0.5},
    "transcoder with skip": {"arch": "batchtopk", "skip": True},
}


@pytest.mark.parametrize("name", RESUMED)
def test_two_hundred_steps_are_a_hundred_a_restore_and_a_hundred_more_to_the_bit(name):
    """Through the bytes of a checkpoint, into a run of another process's making."""
    changes = {"d_sae": 64, "lr": 3e-2, "decay_start": 160, "dead_tokens": 96, "anneal_start": 60, "p_updates": 15}
    changes |= {"penalties": ("l1=0.3",)} if "resampled" in name else {}  # so that latents die
    d_out = 5 if RESUMED[name].get("skip") else None

    def new() -> TrainRun:
        return TrainRun(run_config(**changes, **RESUMED[name]), D_MODEL, 200, select("dense", "cpu"), d_out=d_out)

    def train(run: TrainRun, first: int, last: int) -> list[float]:
        losses = []
        for seed in range(first, last):
            x = batch(seed)
            target = x if d_out is None else x[:, :5] * x[:, 3:]
            pair = {"twin": batch(seed + 999), "paired": torch.arange(32) % 3 > 0} if run.config.consistency else {}
            losses.append(run.step(x, target, **pair).loss.item())
        return losses

    whole = new()
    whole.start_at(batch(0), None if d_out is None else batch(0)[:, :5])
    first = train(whole, 0, 100)
    checkpoint = save({key: tensor.detach().contiguous() for key, tensor in whole.state().items()})
    resampled = [step for step in range(100, 160) if RESUMED[name].get("resample_every") and (step + 1) % 20 == 0]
    second = train(whole, 100, 200)
    resumed = new()
    resumed.restore(load(checkpoint), 100)
    assert train(resumed, 100, 200) == second
    assert first[-1] != second[0]
    ours, theirs = whole.state(), resumed.state()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert resampled or "resampled" not in name


def test_consistency_is_the_distance_of_the_codes_over_rows_whose_own_token_is_the_same():
    x, twin, paired = batch(0), batch(1), torch.arange(32) < 10
    plain, pulled = (make_run(arch="standard", consistency=weight) for weight in (0.0, 0.5))
    f, others = plain.sae.encode(x), plain.sae.encode(twin)
    expected = 0.5 * (f - others)[:10].square().sum(1).mean().item()
    assert expected > 0.001
    loss, with_pull = plain.step(x, x).loss, pulled.step(x, x, twin=twin, paired=paired).loss
    assert with_pull.item() == pytest.approx(loss.item() + expected, rel=1e-5)


@pytest.mark.parametrize("arch", available("architectures"))
def test_consistency_draws_the_two_views_together(arch):
    x, paired = batch(0), torch.ones(32, dtype=torch.bool)
    twin, distances = x + 0.3 * batch(7), []
    for weight in (0.0, 3.0):
        run = make_run(arch=arch, consistency=weight)
        run.start_at(x)
        for _ in range(20):
            run.step(x, x, twin=twin, paired=paired)
        distances.append(inconsistency(run.sae, forward(run.sae, x).f, twin, paired).item())
    assert distances[1] < 0.8 * distances[0]


def test_consistency_is_nothing_without_paired_rows_and_for_a_view_that_is_the_same():
    sae, x, none = make_run().sae, batch(0), torch.zeros(32, dtype=torch.bool)
    f = forward(sae, x).f
    assert inconsistency(sae, f, batch(1), none).item() == 0
    assert inconsistency(sae, f, x, ~none).item() == 0


@pytest.mark.parametrize("arch", available("architectures"))
@pytest.mark.parametrize("weight", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_weight_that_is_not_finite_shows_in_the_loss_and_nothing_raises(arch, weight):
    """Whoever trains many SAEs ends this one and goes on with the others."""
    run = make_run(arch=arch)
    run.start_at(batch(0))
    with torch.no_grad():
        getattr(run.sae, weight)[3:5] = torch.nan
    loss = run.step(batch(0), batch(0)).loss
    assert not loss.isfinite()
    run.step(batch(1), batch(1))


@pytest.mark.parametrize("arch", available("architectures"))
def test_single_precision_follows_double(arch):
    """Without a threshold that is crossed by a hair: jumprelu's start where nothing is."""
    runs = [
        TrainRun(run_config(arch), D_MODEL, 60, select("dense", "cpu"), dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    ]
    for run in runs:
        run.start_at(batch(0).to(run.sae.b_dec.dtype))
    for seed in range(8):
        one, other = (run.step(*[batch(seed).to(run.sae.b_dec.dtype)] * 2).reconstruction for run in runs)
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_another_target_is_reconstructed():
    x, target = batch(0), batch(1)
    run = make_run(arch="topk")
    outcome = run.step(x, target)
    assert outcome.loss.item() == pytest.approx((outcome.reconstruction - target).square().sum(1).mean().item())


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


def test_thresholds_of_jumprelu_stay_at_0_or_above_so_that_use_gives_the_codes_of_training():
    run = make_run(arch="jumprelu", k=20, bandwidth=0.2, lr=0.02, d_sae=32)
    run.start_at(batch(0))
    lowest = []
    for seed in range(60):
        run.step(batch(seed), batch(seed))
        assert run.sae.threshold is not None
        lowest.append(run.sae.threshold.min().item())
    assert min(lowest) == 0.0
    x = batch(99)
    assert run.sae.encode(x).equal(run.sae.activation.train(run.sae.pre_activations(x), run.sae.threshold)[0])
