"""Every architecture of dictionary_learning against its plain statement, in plain_trainers: 50 steps side by side.

Ours runs in float32, the plain one in float64, from the same weights and on the same batches. All that a long run goes
through happens within the 50 steps: warm-ups, decay, dead latents and AuxK, the threshold's average, nine moves of p,
and resampling. The data are chosen so that no choice (top-k, threshold) hangs on a rounding error.

"Relative" is |loss - plain loss| / plain loss at every step, and for each weight tensor the Frobenius norm of the
difference over that of the plain tensor, at the end.
"""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from plain_trainers import PlainTrainer, setup_of
from torch import Tensor
from train_fixtures import WITHOUT_K, run_config

from train.config import RunConfig
from train.kernels import select
from train.names import available
from train.step import TrainRun

D_MODEL, D_SAE, N_STEPS, N_ROWS = 16, 64, 50, 64
SINGLE, DOUBLE = 1e-5, 1e-12
LATE = 18
CONFIG = run_config(
    d_sae=D_SAE,
    lr=1e-3,
    warmup_steps=5,
    decay_start=40,
    sparsity_warmup_steps=10,
    anneal_start=10,
    threshold_start=5,
    dead_tokens=3 * N_ROWS,
)
CASES = [(arch, 0) for arch in available("architectures")] + [(arch, 12) for arch in WITHOUT_K]


def batches() -> list[Tensor]:
    """Sparse sums of directions with a mean, of mean squared length one: [N_ROWS, D_MODEL] in float64."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_MODEL, generator=generator, dtype=torch.float64)
    made = []
    for _ in range(N_STEPS):
        on = torch.rand(N_ROWS, 40, generator=generator) < 0.1
        x = (on * torch.rand(N_ROWS, 40, generator=generator, dtype=torch.float64)) @ directions + 0.3
        made.append(x / x.square().sum(1).mean().sqrt())
    return made


def started(config: RunConfig, dtype: torch.dtype) -> TrainRun:
    """Before the first step, with a dozen latents that hardly fire, and three that never do."""
    run = TrainRun(config, D_MODEL, N_STEPS, select("dense", "cpu"), dtype=dtype)
    run.start_at(batches()[0].to(dtype))
    with torch.no_grad():
        run.sae.b_enc[3:15] = -0.4 if run.recipe.init_norm == 1 else -0.04
        run.sae.b_enc[:3] = -3.0
        if config.arch == "jumprelu":  # where many pre-activations are, so that their gradient is put to work
            assert run.sae.threshold is not None
            run.sae.threshold.copy_(torch.linspace(0, 0.3, D_SAE))
    return run


@dataclass(kw_only=True)
class Outcome:
    """Ours and the plain one after 50 steps on the same batches."""

    run: TrainRun
    plain: PlainTrainer
    of_losses: float = 0.0
    """Worst relative difference of a loss."""
    n_dead: int = 0
    """Most dead latents at a time."""


@cache
def trained(arch: str, resample_every: int, dtype: torch.dtype) -> Outcome:
    k = 0 if arch in WITHOUT_K else 4
    run = started(replace(CONFIG, arch=arch, k=k, resample_every=resample_every), dtype)
    plain = PlainTrainer(setup_of(run.config, N_STEPS), dict(run.sae.named_parameters()))
    outcome = Outcome(run=run, plain=plain)
    for step, x in enumerate(batches()):
        if resample_every and step == LATE:
            with torch.no_grad():
                for b_enc in (run.sae.b_enc, outcome.plain.w["b_enc"]):
                    b_enc[20:24] = -3.0  # they die, for a later round to find
        loss = run.step(x.to(dtype), x.to(dtype)).loss
        expected = outcome.plain.step(x.to(dtype))
        outcome.of_losses = max(outcome.of_losses, abs(loss.item() - expected) / expected)
        outcome.n_dead = max(outcome.n_dead, int(run.dead().sum()))
    return outcome


def differences(outcome: Outcome) -> dict[str, float]:
    """Relative difference of each weight tensor."""
    found = {}
    for name, ours in outcome.run.sae.named_parameters():
        plain = outcome.plain.w[name].detach()
        found[name] = ((ours.double() - plain).norm() / plain.norm()).item()
    return found


@pytest.mark.parametrize(("arch", "resample_every"), CASES)
def test_fifty_steps_in_single_precision_follow_the_formulas(arch, resample_every):
    outcome = trained(arch, resample_every, torch.float32)
    assert outcome.of_losses < SINGLE
    assert max(differences(outcome).values()) < SINGLE, differences(outcome)


@pytest.mark.parametrize(("arch", "resample_every"), CASES)
def test_fifty_steps_in_double_precision_follow_the_formulas(arch, resample_every):
    """Tighter, so that what is left of the difference in single precision is known to be rounding."""
    outcome = trained(arch, resample_every, torch.float64)
    run, plain = outcome.run, outcome.plain
    assert outcome.of_losses < DOUBLE
    assert max(differences(outcome).values()) < DOUBLE, differences(outcome)
    assert run.silent_tokens.equal(plain.silent)
    if arch in ("batchtopk", "matryoshka"):
        assert run.sae.threshold is not None
        assert run.sae.threshold.item() == pytest.approx(plain.theta, rel=DOUBLE)
    if run.annealing is not None:
        assert run.annealing.p(run.n_done) == pytest.approx(plain.p)
        assert run.annealing.rescale.item() == pytest.approx(plain.alpha, rel=DOUBLE)


@pytest.mark.parametrize(("arch", "resample_every"), CASES)
def test_in_these_steps_everything_happens(arch, resample_every):
    """Or the comparison above would show nothing."""
    begin = dict(started(replace(CONFIG, arch=arch, k=4), torch.float64).sae.named_parameters())
    outcome = trained(arch, resample_every, torch.float64)
    plain = outcome.plain
    for name, start in begin.items():
        assert (plain.w[name] - start).norm() > 0.01 * plain.w[name].norm(), f"{name} hardly moved"
    if resample_every:
        assert plain.n_resampled == 3 + 4
    elif arch in ("topk", "batchtopk", "matryoshka"):
        assert outcome.n_dead > D_MODEL // 2, "AuxK has to choose among the dead"
    if arch == "p_anneal":
        assert plain.n_moves == 9
        assert plain.p == pytest.approx(1 - 0.8 * 8 / 9)
        assert plain.alpha != 1
    assert plain.theta > 0 or arch not in ("batchtopk", "matryoshka")
