"""Resampling: dead latents start again from badly explained rows, and nothing else moves."""

import pytest
import torch
from train_fixtures import WITHOUT_K, run_config

from train.kernels import select
from train.resampling import resample
from train.step import TrainRun

D_MODEL, D_SAE, N_ROWS = 8, 32, 40


def rows(seed: int) -> torch.Tensor:
    return torch.randn(N_ROWS, D_MODEL, generator=torch.Generator().manual_seed(seed)).relu() + 0.2


def make_run(arch: str = "standard", d_out: int | None = None, **changes) -> TrainRun:
    """After a few steps, so that Adam has something to forget."""
    config = run_config(arch, penalties=("l1=0.01",) if arch != "p_anneal" else (), **changes)
    run = TrainRun(config, D_MODEL, 60, select("dense", "cpu"), d_out=d_out)
    for seed in range(5):
        run.step(rows(seed), rows(seed)[:, : run.sae.d_out])
    return run


def resampled(run: TrainRun, dead: torch.Tensor, x: torch.Tensor, errors: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return resample(run.sae, run.optimizer, dead, x, x[:, : run.sae.d_out], errors, seed)


def tensors(run: TrainRun) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state().items() if name.startswith(("sae.", "adam."))}


def latent(name: str, tensor: torch.Tensor, i: int) -> torch.Tensor:
    """What a tensor says of one latent."""
    return tensor[:, i] if "W_enc" in name else tensor[i]


def of_latents(name: str) -> bool:
    return not name.endswith(("step", "b_dec")) and "b_dec." not in name


@pytest.mark.parametrize("arch", WITHOUT_K)
def test_the_dead_start_again_and_the_living_and_b_dec_stay_to_the_bit(arch):
    run, x = make_run(arch), rows(9)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[2, 5, 31]] = True
    before, length = tensors(run), run.sae.W_enc[:, ~dead].norm(dim=0).mean()
    latents = resampled(run, dead, x, torch.rand(N_ROWS) + 0.1)
    assert latents.tolist() == [2, 5, 31]
    for name, after in tensors(run).items():
        if not of_latents(name):
            assert after.equal(before[name]), name
            continue
        for i in range(D_SAE):
            same = latent(name, after, i).equal(latent(name, before[name], i))
            assert same != (i in (2, 5, 31)) or not latent(name, before[name], i).any(), (name, i)
            if i in (2, 5, 31) and (name.startswith("adam.") or "W_" not in name):
                assert not latent(name, after, i).any(), name
    directions = torch.nn.functional.normalize(x, dim=1)
    used = set()
    for i in (2, 5, 31):
        row = int((directions @ run.sae.W_dec[i]).argmax())
        used.add(row)
        torch.testing.assert_close(run.sae.W_dec[i].detach(), directions[row])
        torch.testing.assert_close(run.sae.W_enc[:, i].detach(), 0.2 * length.detach() * directions[row])
    assert len(used) == 3


def test_a_transcoder_reads_from_the_row_and_writes_its_target():
    run, x = make_run(d_out=5), rows(9)
    errors = torch.zeros(N_ROWS)
    errors[7] = 1.0
    latents = resampled(run, torch.arange(D_SAE) == 4, x, errors)
    assert latents.tolist() == [4]
    torch.testing.assert_close(run.sae.W_dec[4].detach(), torch.nn.functional.normalize(x[7, :5], dim=0))
    torch.testing.assert_close(
        torch.nn.functional.normalize(run.sae.W_enc[:, 4].detach(), dim=0), torch.nn.functional.normalize(x[7], dim=0)
    )


def test_rows_are_drawn_by_the_square_of_their_error():
    """An error three times as large is drawn nine times as often; the seed alone decides which."""
    run, x = make_run(), rows(9)
    errors = torch.zeros(N_ROWS)
    errors[3], errors[8] = 3.0, 1.0
    directions = torch.nn.functional.normalize(x, dim=1)
    drawn = []
    for seed in range(400):
        resampled(run, torch.arange(D_SAE) == 0, x, errors, seed)
        drawn.append(int((directions @ run.sae.W_dec[0]).argmax()))
    assert set(drawn) == {3, 8}
    assert drawn.count(3) / 400 == pytest.approx(0.9, abs=0.06)
    resampled(run, torch.arange(D_SAE) == 0, x, errors, 399)
    assert int((directions @ run.sae.W_dec[0]).argmax()) == drawn[399]


def test_more_dead_latents_than_rows_with_an_error_have_to_wait():
    run, x = make_run(), rows(9)
    errors = (torch.arange(N_ROWS) < 4).float()
    assert resampled(run, torch.arange(D_SAE) >= 10, x, errors).tolist() == [10, 11, 12, 13]
    assert resampled(run, torch.ones(D_SAE, dtype=torch.bool), x, errors).tolist() == [0, 1, 2, 3]
    assert run.sae.W_enc.isfinite().all()


@pytest.mark.parametrize("error", [0.0, torch.nan, torch.inf])
def test_without_an_error_or_with_one_that_is_not_finite_nothing_happens(error):
    run = make_run()
    before = tensors(run)
    dead = torch.ones(D_SAE, dtype=torch.bool)
    assert len(resampled(run, dead, rows(9), torch.full((N_ROWS,), error))) == 0
    assert all(tensor.equal(before[name]) for name, tensor in tensors(run).items())


def test_a_run_resamples_what_was_silent_since_the_last_time_and_not_while_the_rate_falls():
    changes = {"resample_every": 10, "decay_start": 35, "dead_tokens": 10**6}
    run = TrainRun(run_config("standard", **changes), D_MODEL, 60, select("dense", "cpu"))
    revived = []
    for step in range(60):
        if step in (0, 12, 25, 33):  # these die: in the middle of a round, but for the first
            with torch.no_grad():
                run.sae.b_enc[step % 32] = -100.0
        run.step(rows(step), rows(step))
        with torch.no_grad():
            revived.append([i for i in (0, 12, 25, 1) if step and run.sae.b_enc[i] == 0])
    found = {step + 1: latents for step, latents in enumerate(revived) if latents}
    assert found == {10: [0], 30: [12]}  # 25 would be found at 40, when the rate has begun to fall
    assert run.silent_tokens[0] < 10 * N_ROWS
    assert run.silent_tokens[25] == 35 * N_ROWS
