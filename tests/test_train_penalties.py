"""Penalties one by one: their values, and whom their gradients reach."""

from dataclasses import replace

import pytest
import torch
from train_fixtures import run_config

from cache_spec import UserError
from train.activations import JumpReLU, ReLU
from train.kernels import select
from train.kernels.dense import forward as forward_of
from train.penalties.auxk import auxk
from train.penalties.gate import gate as gate_penalty
from train.penalties.l0 import l0
from train.penalties.l1 import l1
from train.penalties.lp import lp, mean_power
from train.recipe import StepView
from train.sae import SparseAutoencoder, initialise
from train.step import TrainRun

D_MODEL, D_SAE, N_ROWS = 8, 24, 32


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(N_ROWS, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(
    activation=None, dead: list[int] | None = None, sparsity_scale: float = 1.0, *, gated: bool = False
) -> StepView:
    """One forward pass of an SAE; latents that are called dead still have positive pre-activations."""
    activation = activation or ReLU()
    sae = SparseAutoencoder(D_MODEL, D_SAE, activation, gated=gated, dtype=torch.float64)
    initialise(sae, 0, entries="uniform", norm=1.0, threshold=0.3)
    x = rows()
    forward = forward_of(sae, x)
    return StepView(
        sae=sae,
        x=x,
        target=x,
        forward=forward,
        dead=None if dead is None else torch.tensor(dead),
        sparsity_scale=sparsity_scale,
        k=3,
    )


def gradient(sae: SparseAutoencoder, name: str) -> torch.Tensor:
    found = getattr(sae, name).grad
    return torch.zeros_like(getattr(sae, name)) if found is None else found


@pytest.mark.parametrize("dead", [[3], [0, 5, 9], list(range(4, 20))])
def test_auxk_teaches_the_dead_latents_and_only_them(dead):
    """Encoder and decoder alike: a peer's auxiliary loss never reached the encoder."""
    step = view(dead=dead)
    auxk(step).backward()
    alive = [i for i in range(D_SAE) if i not in dead]
    for name, dimension in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
        found = gradient(step.sae, name)
        moved = found if found.ndim == 1 else found.abs().sum(1 - dimension)
        assert not moved[alive].any(), name
        assert moved[dead].any(), name


def test_auxk_uses_the_best_half_of_d_model_of_each_row():
    dead = list(range(4, 20))
    step = view(dead=dead)
    residual = (step.target - step.forward.reconstructions[-1]).detach()
    pre = step.sae.pre_activations(step.x)
    guess = torch.zeros_like(residual)
    for row in range(N_ROWS):
        best = sorted(dead, key=lambda i: -pre[row, i].item())[: D_MODEL // 2]
        for i in best:
            guess[row] += torch.relu(pre[row, i]) * step.sae.W_dec[i]
    expected = (residual - guess).square().sum() / (residual - residual.mean(0)).square().sum()
    assert auxk(step).item() == pytest.approx(expected.item())


def test_auxk_may_be_told_how_many_to_use():
    step = view(dead=list(range(4, 20)))
    assert auxk(replace(step, aux_k=D_MODEL // 2)).item() == auxk(step).item()
    errors = [auxk(replace(step, aux_k=n)).item() for n in (1, 16, 100)]
    assert errors[0] != pytest.approx(errors[1])
    assert errors[1] == errors[2]  # there are no more


def test_auxk_is_nothing_without_dead_latents_or_without_a_residual():
    assert auxk(view()).item() == 0
    step = view(dead=[1])
    perfect = replace(step, target=step.forward.reconstructions[-1].detach())
    assert auxk(perfect).isfinite()


def test_auxk_reconstructs_what_is_missing_of_the_target_not_of_the_input():
    step = view(dead=[1, 2])
    assert auxk(replace(step, target=rows(1))).item() != pytest.approx(auxk(step).item())


def test_l1_is_the_mean_sum_of_the_codes_and_warms_up():
    step = view()
    assert l1(step).item() == pytest.approx(step.forward.f.abs().sum(1).mean().item())
    assert l1(replace(step, sparsity_scale=0.25)).item() == pytest.approx(l1(step).item() / 4)
    assert l1(replace(step, sparsity_scale=0.0)).item() == 0


def scaled(step: StepView, factor: float) -> StepView:
    """The same reconstruction by longer decoder rows and smaller codes."""
    with torch.no_grad():
        for tensor in (step.sae.W_enc, step.sae.b_enc):
            tensor /= factor
        step.sae.W_dec.mul_(factor)
    return replace(step, forward=forward_of(step.sae, step.x))


@pytest.mark.parametrize("penalty", [l1, lp])
def test_sparsity_cannot_be_had_by_longer_decoder_rows_where_those_are_free(penalty):
    free = replace(view(), decoder="free", p=0.5)
    before = penalty(free).item()
    assert penalty(scaled(free, 10.0)).item() == pytest.approx(before, rel=1e-2)
    unit = replace(view(), p=0.5)
    assert penalty(scaled(unit, 10.0)).item() < before / 2
    step = replace(view(), decoder="free", p=0.5)
    penalty(step).backward()
    assert gradient(step.sae, "W_dec").any()


@pytest.mark.parametrize("penalty", [l1, lp])
def test_sparsity_of_a_gated_sae_is_asked_of_its_gate(penalty):
    step = view(gated=True)
    gate = step.forward.gate
    assert gate is not None
    assert penalty(replace(step, p=1.0)).item() == pytest.approx(gate.sum(1).mean().item())
    penalty(step).backward()
    assert gradient(step.sae, "b_enc").any()
    assert not gradient(step.sae, "b_mag").any()


def test_lp_is_the_mean_sum_of_the_codes_to_a_power():
    step = view()
    assert lp(step).item() == pytest.approx(l1(step).item())
    for p in (0.9, 0.5, 0.2):
        f = step.forward.f.clamp(min=1e-300)
        expected = torch.where(f > 1e-200, f**p, 0.0).sum(1).mean().item()
        found = lp(replace(step, p=p, sparsity_scale=0.5, p_rescale=torch.tensor(3.0))).item()
        assert found == pytest.approx(1.5 * expected, rel=5e-3)


def test_the_slope_of_lp_stays_finite_where_a_code_is_next_to_nothing():
    f = torch.tensor([[0.0, 1e-30, 1e-3, 1.0]], requires_grad=True)
    mean_power(f, 0.2).backward()
    assert f.grad is not None
    assert f.grad.isfinite().all()
    assert f.grad.max() < 2000
    assert f.grad[0, 3].item() == pytest.approx(0.2, rel=1e-3)


def test_gate_reconstructs_by_the_gate_alone_and_cannot_move_the_decoder():
    step = view(gated=True)
    gate = step.forward.gate
    assert gate is not None
    error = step.target - gate @ step.sae.W_dec - step.sae.b_dec
    assert gate_penalty(step).item() == pytest.approx(error.square().sum(1).mean().item())
    gate_penalty(step).backward()
    assert gradient(step.sae, "W_enc").any()
    assert gradient(step.sae, "b_enc").any()
    for name in ("W_dec", "r_mag", "b_mag"):
        assert not gradient(step.sae, name).any(), name
    with pytest.raises(UserError, match="gated"):
        gate_penalty(view())


def test_l0_is_the_squared_relative_distance_from_k():
    step = view(JumpReLU(bandwidth=0.5))
    mean = (step.forward.f > 0).double().sum(1).mean().item()
    assert l0(step).item() == pytest.approx((mean / 3 - 1) ** 2)
    assert mean > 3


def test_l0_raises_thresholds_when_too_many_latents_are_active_and_lowers_them_when_too_few():
    for k, sign in ((1, -1), (20, 1)):
        step = replace(view(JumpReLU(bandwidth=0.5)), k=k)
        l0(step).backward()
        found = gradient(step.sae, "threshold")
        assert (sign * found >= 0).all()
        assert found.any()
        assert not gradient(step.sae, "W_enc").any()  # a count says nothing about the weights


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
def test_a_batch_of_one_row_with_dead_latents_leaves_every_weight_finite(arch, kernel):
    """Its residual has no variance, over which auxk could be."""
    run = TrainRun(run_config(arch, d_sae=72, dead_tokens=5), 8, 60, select(kernel, "cpu"))
    for seed in range(12):
        x = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed)) / 8**0.5
        assert run.step(x, x).loss < 100
    assert run.dead().any()
    assert all(bool(value.isfinite().all()) for value in run.state().values())
