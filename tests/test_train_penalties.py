"""Penalties one by one: their values, and whom their gradients reach."""

from dataclasses import replace

import pytest
import torch

from train.activations import JumpReLU, ReLU
from train.kernels import select
from train.penalties.auxk import auxk
from train.penalties.l0 import l0
from train.penalties.l1 import l1
from train.recipe import StepView
from train.sae import SparseAutoencoder, initialise

D_MODEL, D_SAE, N_ROWS = 8, 24, 32


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(N_ROWS, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(activation=None, dead: list[int] | None = None, sparsity_scale: float = 1.0) -> StepView:
    """One forward pass of an SAE; latents that are called dead still have positive pre-activations."""
    activation = activation or ReLU()
    sae = SparseAutoencoder(D_MODEL, D_SAE, activation, dtype=torch.float64)
    initialise(sae, 0, entries="uniform", norm=1.0, threshold=0.3)
    x = rows()
    forward = select("dense", "cpu").forward(sae, x)
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
