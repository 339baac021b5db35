"""Transcoders, with and without a linear path; and gates, the other thing that an SAE may have beside its weights."""

import pytest
import torch
from train_fixtures import run_config

from train.activations import BatchTopK, ReLU, TopK
from train.kernels import select
from train.kernels.dense import forward as forward_of
from train.names import available
from train.sae import SparseAutoencoder, initialise
from train.step import TrainRun, new_sae, recipe_of

D_MODEL, D_OUT, D_SAE = 8, 5, 32


def rows(seed: int, n: int = 32, width: int = D_MODEL, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype).relu() + 0.2
    return x / x.square().sum(1).mean().sqrt()


def make_run(arch: str = "topk", d_out: int | None = D_OUT, **changes) -> TrainRun:
    return TrainRun(run_config(arch, **changes), D_MODEL, 400, select("dense", "cpu"), d_out=d_out)


@pytest.mark.parametrize("arch", available("architectures"))
@pytest.mark.parametrize("skip", [False, True])
def test_every_architecture_learns_a_map_to_another_space(arch, skip):
    mixing = torch.randn(D_MODEL, D_OUT, generator=torch.Generator().manual_seed(1))
    run = make_run(arch, skip=skip, warmup_steps=5, decay_start=300)
    run.start_at(rows(0), torch.relu(rows(0) @ mixing - 0.3))
    losses = []
    for step in range(150):
        x = rows(step)
        losses.append(run.step(x, torch.relu(x @ mixing - 0.3)).loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("arch", available("architectures"))
@pytest.mark.parametrize("d_out", [D_OUT, D_MODEL])
def test_a_transcoder_s_offset_belongs_to_its_target(arch, d_out):
    """Even where both spaces have the same width."""
    run = make_run(arch, d_out=d_out)
    assert not run.sae.subtract_b_dec
    target = rows(3, width=d_out)
    run.start_at(rows(0), target)
    torch.testing.assert_close(run.sae.b_dec.detach(), target.mean(0))
    run = make_run(arch, d_out=d_out, init_b_dec="zero")
    run.start_at(rows(0), target)
    assert not run.sae.b_dec.any()


def test_a_transcoder_s_encoder_is_not_its_decoder_turned_round():
    sae = new_sae(recipe_of(run_config("topk"), transcoder=True), D_MODEL, D_SAE, 0, d_out=D_MODEL)
    assert not torch.allclose(sae.W_enc, sae.W_dec.t())
    for rows_ in (sae.W_enc.t(), sae.W_dec):
        torch.testing.assert_close(rows_.norm(dim=1), torch.ones(D_SAE))
    plain = new_sae(recipe_of(run_config("topk")), D_MODEL, D_SAE, 0)
    assert plain.W_dec.equal(sae.W_dec)
    assert plain.W_enc.equal(plain.W_dec.t())


def test_a_skip_starts_at_zero_and_takes_over_what_is_linear():
    mixing = torch.randn(D_MODEL, D_OUT, generator=torch.Generator().manual_seed(1))
    errors = []
    for skip in (False, True):
        run = make_run(skip=skip, warmup_steps=5, decay_start=300, k=1)
        assert (run.sae.W_skip is not None) == skip
        assert run.sae.W_skip is None or not run.sae.W_skip.any()
        run.start_at(rows(0), rows(0) @ mixing)
        for step in range(399):
            loss = run.step(rows(step), rows(step) @ mixing).loss
        errors.append(loss.item())
    assert errors[1] < 0.1 * errors[0]
    assert run.sae.W_skip is not None
    assert ((run.sae.W_skip - mixing).norm() / mixing.norm()).item() < 0.5


@pytest.mark.parametrize("prefixes", [(D_SAE,), (4, 10, D_SAE)])
def test_every_prefix_has_the_skip_and_needs_the_input(prefixes):
    sae = SparseAutoencoder(
        D_MODEL, D_SAE, ReLU(), prefixes, subtract_b_dec=False, d_out=D_OUT, skip=True, dtype=torch.float64
    )
    initialise(sae, 0, entries="normal", norm=1.0)
    x = rows(0, dtype=torch.float64)
    assert sae.W_skip is not None
    with torch.no_grad():
        sae.W_skip.normal_(generator=torch.Generator().manual_seed(2))
        sae.b_dec.fill_(0.3)
    f = sae.encode(x)
    for end, made in zip(prefixes, sae.decode_prefixes(f, x), strict=True):
        torch.testing.assert_close(made, f[:, :end] @ sae.W_dec[:end] + sae.b_dec + x @ sae.W_skip)
    torch.testing.assert_close(sae(x), sae.decode_prefixes(f, x)[-1])
    with pytest.raises(AssertionError, match="input"):
        sae.decode(f)


def test_what_makes_no_sense_cannot_be_built():
    with pytest.raises(AssertionError, match="belongs to the target"):
        SparseAutoencoder(D_MODEL, D_SAE, ReLU(), d_out=D_OUT)
    with pytest.raises(AssertionError, match="linear path"):
        SparseAutoencoder(D_MODEL, D_SAE, ReLU(), subtract_b_dec=False, skip=True)


def gated(activation, seed: int = 0) -> SparseAutoencoder:
    """One whose gate and magnitudes differ."""
    sae = SparseAutoencoder(D_MODEL, D_SAE, activation, gated=True, dtype=torch.float64)
    initialise(sae, seed, entries="normal", norm=1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in (sae.b_enc, sae.b_dec, sae.b_mag, sae.r_mag):
            assert vector is not None
            vector.normal_(std=0.3, generator=generator)
    return sae


@pytest.mark.parametrize("activation", [ReLU(), TopK(3), BatchTopK(3)])
def test_a_gate_says_which_and_magnitudes_how_much_with_the_gradients_of_the_formula(activation):
    """And any activation may be the gate."""
    ours, plain, x = gated(activation), gated(activation), rows(4, dtype=torch.float64)
    weight = torch.randn(32, D_SAE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    forward = forward_of(ours, x)
    assert forward.gate is not None
    is_open = (forward.gate > 0).detach()
    hidden = (x - plain.b_dec) @ plain.W_enc
    assert plain.r_mag is not None
    assert plain.b_mag is not None
    f = is_open * torch.relu(torch.exp(plain.r_mag) * hidden + plain.b_mag)
    torch.testing.assert_close(forward.f, f)
    torch.testing.assert_close(forward.gate, is_open * (hidden + plain.b_enc))
    ((forward.f * weight).sum() + forward.gate.square().sum()).backward()
    ((f * weight).sum() + (is_open * (hidden + plain.b_enc)).square().sum()).backward()
    for name in ("W_enc", "b_enc", "b_dec", "r_mag", "b_mag"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(plain, name).grad, msg=name)


def test_a_gated_sae_in_use_is_the_same_and_another_threshold_moves_its_gate():
    sae, x = gated(ReLU()), rows(4, dtype=torch.float64)
    f = sae.encode(x)
    torch.testing.assert_close(f, forward_of(sae, x).f)
    higher = sae.with_threshold(0.2).encode(x)
    is_open = sae.pre_activations(x) > 0.2
    assert higher.equal(torch.where(is_open, f, 0.0))
    assert 0 < (higher > 0).sum() < (f > 0).sum()
