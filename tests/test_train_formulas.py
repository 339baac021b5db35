"""Training against a plain statement of its formulas: slow, in float64, one row and one latent at a time in spirit.

The formulas are those of dictionary_learning's trainers; nothing here calls the code under test but to run it.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from train_fixtures import run_config

from train.config import RunConfig
from train.kernels import select
from train.names import available
from train.step import TrainRun

D_MODEL, D_SAE, N_STEPS, N_ROWS = 8, 40, 24, 16


def batches(seed: int = 0) -> list[Tensor]:
    """Sparse sums of directions with a mean, of mean squared length about one."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, D_MODEL, generator=generator, dtype=torch.float64)
    made = []
    for _ in range(N_STEPS):
        codes = (torch.rand(N_ROWS, 20, generator=generator) < 0.15).double() * torch.rand(
            N_ROWS, 20, generator=generator, dtype=torch.float64
        )
        x = codes @ directions + 0.3
        made.append(x / x.square().sum(1).mean().sqrt())
    return made


class Plain:
    """One SAE, trained by the formulas."""

    def __init__(self, config: RunConfig, start: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        self.first = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        self.silent = [0] * D_SAE
        self.theta = -1.0
        self.t = 0

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations and codes [N_ROWS, D_SAE]."""
        w, k = self.weights, self.config.k
        shift = 0 if self.config.arch == "jumprelu" else w["b_dec"]
        pre = (x - shift) @ w["W_enc"] + w["b_enc"]
        positive = torch.relu(pre)
        if self.config.arch == "standard":
            return pre, positive
        if self.config.arch == "jumprelu":
            return pre, pre * (pre > w["threshold"])
        keep = torch.zeros_like(pre)
        if self.config.arch == "topk":
            for row in range(N_ROWS):
                keep[row, torch.argsort(positive[row], descending=True)[:k]] = 1
        else:
            keep.view(-1)[torch.argsort(positive.reshape(-1), descending=True)[: k * N_ROWS]] = 1
        return pre, positive * keep

    def auxk(self, pre: Tensor, residual: Tensor) -> Tensor:
        dead = [i for i in range(D_SAE) if self.silent[i] >= self.config.dead_tokens]
        if not dead:
            return torch.zeros((), dtype=torch.float64)
        n_used = min(D_MODEL // 2, len(dead))
        guess = torch.zeros_like(residual)
        for row in range(N_ROWS):
            best = sorted(dead, key=lambda i: -max(pre[row, i].item(), 0))[:n_used]
            for i in best:
                guess[row] = guess[row] + torch.relu(pre[row, i]) * self.weights["W_dec"][i]
        error = (residual.detach() - guess).square().sum(1).mean()
        spread = (residual - residual.mean(0)).square().sum(1).mean().detach()
        return error / spread

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        w, config = self.weights, self.config
        pre, f = self.codes(x)
        self.silent = [0 if (f[:, i] > 0).any() else self.silent[i] + N_ROWS for i in range(D_SAE)]
        ends = [1, 3, 8, 18, 40] if config.arch == "matryoshka" else [D_SAE]
        errors = [(x - f[:, :end] @ w["W_dec"][:end] - w["b_dec"]).square().sum(1).mean() for end in ends]
        loss = torch.stack(errors).sum() / len(ends) ** 2
        warm = min(self.t / config.sparsity_warmup_steps, 1.0)
        residual = (x - f @ w["W_dec"] - w["b_dec"]).detach()
        if config.arch == "standard":
            loss = loss + 0.03 * warm * f.sum(1).mean()
        elif config.arch != "jumprelu":
            loss = loss + self.auxk(pre, residual) / 32
        names = [name for name in w if name != "threshold"]
        found = dict(zip(names, torch.autograd.grad(loss, [w[name] for name in names]), strict=True))
        if config.arch == "jumprelu":
            found["threshold"] = self.threshold_gradient(pre.detach(), f.detach(), residual, warm)
        if config.arch in ("batchtopk", "matryoshka") and self.t > config.threshold_start and (f > 0).any():
            smallest = f[f > 0].min().item()
            beta = config.threshold_beta
            self.theta = smallest if self.theta < 0 else beta * self.theta + (1 - beta) * smallest
        return found

    def threshold_gradient(self, pre: Tensor, f: Tensor, residual: Tensor, warm: float) -> Tensor:
        """Pseudo-derivatives, with a rectangle of width 0.001: -(theta / 0.001) for f, -(1 / 0.001) for the count."""
        theta = self.weights["threshold"].detach()
        found = torch.zeros_like(theta)
        l0 = (f > theta).double().sum(1).mean()
        of_f = -2 * residual @ self.weights["W_dec"].detach().T / N_ROWS  # d error / d f
        of_count = 2 * warm * (l0 / self.config.k - 1) / self.config.k / N_ROWS
        for i in range(D_SAE):
            for row in range(N_ROWS):
                if abs(pre[row, i] - theta[i]) < 0.0005:
                    found[i] -= theta[i] / 0.001 * of_f[row, i]
                if abs(f[row, i] - theta[i]) < 0.0005:
                    found[i] -= 1 / 0.001 * of_count
        return found

    def step(self, x: Tensor) -> None:
        found = self.gradients(x)
        with torch.no_grad():
            rows = self.weights["W_dec"] / self.weights["W_dec"].norm(dim=1, keepdim=True)
            for i in range(D_SAE):
                found["W_dec"][i] -= (found["W_dec"][i] @ rows[i]) * rows[i]
            if self.config.arch != "standard":
                norm = math.sqrt(sum(g.square().sum().item() for g in found.values()))
                found = {name: g * min(1.0, 1.0 / (norm + 1e-6)) for name, g in found.items()}
            self.adam(found)
            self.weights["W_dec"] /= self.weights["W_dec"].norm(dim=1, keepdim=True)
        self.t += 1

    def adam(self, found: dict[str, Tensor]) -> None:
        config, t = self.config, self.t
        rate = config.lr * min(1.0, t / config.warmup_steps)
        if t > config.decay_start:
            rate = config.lr * (N_STEPS - t) / (N_STEPS - config.decay_start)
        beta_1, beta_2 = (0.0 if config.arch == "jumprelu" else 0.9), 0.999
        for name, g in found.items():
            self.first[name] = beta_1 * self.first[name] + (1 - beta_1) * g
            self.second[name] = beta_2 * self.second[name] + (1 - beta_2) * g.square()
            m = self.first[name] / (1 - beta_1 ** (t + 1))
            v = self.second[name] / (1 - beta_2 ** (t + 1))
            self.weights[name] -= rate * m / (v.sqrt() + 1e-8)


def start(config: RunConfig, dtype: torch.dtype) -> TrainRun:
    run = TrainRun(config, D_MODEL, N_STEPS, select("dense", "cpu"), dtype=dtype)
    run.start_at(batches()[0].to(dtype))
    return run


def require(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


CONFIGS = {
    arch: run_config(arch, d_sae=D_SAE, lr=3e-2, decay_start=18, dead_tokens=3 * N_ROWS, threshold_start=3)
    for arch in ("standard", "topk", "batchtopk", "matryoshka", "jumprelu")
}


def test_every_architecture_is_stated():
    assert sorted(CONFIGS) == available("architectures")


@pytest.mark.parametrize("arch", CONFIGS)
def test_training_follows_the_formulas(arch):
    config = replace(CONFIGS[arch], d_sae=D_SAE)
    run = start(config, torch.float64)
    if arch == "matryoshka":
        assert run.sae.prefixes == (1, 3, 8, 18, 40)
    if arch == "jumprelu":  # thresholds where many pre-activations are, so that their gradient is put to work
        with torch.no_grad():
            require(run.sae.threshold).copy_(torch.linspace(0, 0.3, D_SAE))
    weights = {name: tensor.detach() for name, tensor in run.sae.named_parameters()}
    plain = Plain(config, weights)
    begin = {name: tensor.clone() for name, tensor in weights.items()}
    saw_dead = False
    for x in batches():
        run.step(x, x)
        plain.step(x)
        saw_dead |= bool(run.dead().any())
    for name, ours in run.sae.named_parameters():
        moved = (plain.weights[name] - begin[name]).norm()
        assert moved > 0, f"{name} never moved, so nothing was tested"
        assert (ours - plain.weights[name]).norm() <= 1e-8 * moved, name
    assert run.silent_tokens.tolist() == plain.silent
    assert saw_dead == (arch != "standard")
    if arch in ("batchtopk", "matryoshka"):
        assert require(run.sae.threshold).item() == pytest.approx(plain.theta, rel=1e-9)


@pytest.mark.parametrize("arch", CONFIGS)
def test_single_precision_follows_double(arch):
    double, single = (start(CONFIGS[arch], dtype) for dtype in (torch.float64, torch.float32))
    with torch.no_grad():
        single.sae.b_dec.copy_(double.sae.b_dec)
    for x in batches()[:8]:
        one, _ = double.step(x, x)
        other, _ = single.step(x.float(), x.float())
        torch.testing.assert_close(other.reconstructions[-1].double(), one.reconstructions[-1], rtol=1e-4, atol=1e-4)


def test_another_target_is_reconstructed():
    x, target = batches()[:2]
    run = start(CONFIGS["topk"], torch.float64)
    forward, loss = run.step(x, target)
    assert loss.item() == pytest.approx((forward.reconstructions[-1] - target).square().sum(1).mean().item())
