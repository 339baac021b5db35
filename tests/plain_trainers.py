"""dictionary_learning's trainers stated once more from their formulas: plain, slow, in float64.

Nothing of train/ is imported. Gradients come from autograd where the loss has them and are written out where they are
pseudo-derivatives; Adam, clipping, the decoder's constraint and every schedule are written out.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache_spec.seeds import derive_seed

UNIT_DECODER = ("standard", "p_anneal", "gated", "topk", "batchtopk", "matryoshka", "jumprelu")
CLIPPED = ("standard_april", "topk", "batchtopk", "matryoshka", "jumprelu")
B_DEC_NOT_SUBTRACTED = ("standard_april", "jumprelu")
WITHOUT_FIRST_MOMENT = ("gated", "jumprelu")
PENALTIES = {"standard": 0.03, "standard_april": 0.03, "gated": 0.04, "p_anneal": 0.015}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a trainer is told. Steps are counted from 0, tokens in rows."""

    arch: str
    n_steps: int
    lr: float
    warmup_steps: int
    decay_start: int
    sparsity_warmup_steps: int
    penalty: float = 0.0
    k: int = 0
    dead_tokens: int = 0
    threshold_start: int = 0
    threshold_beta: float = 0.0
    bandwidth: float = 0.001
    anneal_start: int = 0
    n_sparsity_updates: int = 10
    queue_length: int = 10
    p_end: float = 0.2
    resample_every: int = 0
    seed: int = 0


def setup_of(config: Any, n_steps: int) -> Setup:
    """What a RunConfig says, taken field by field; the architecture's own penalty."""
    return Setup(
        arch=config.arch,
        n_steps=n_steps,
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        decay_start=config.decay_start,
        sparsity_warmup_steps=config.sparsity_warmup_steps,
        penalty=PENALTIES.get(config.arch, 0.0),
        k=config.k,
        dead_tokens=config.dead_tokens,
        threshold_start=config.threshold_start,
        threshold_beta=config.threshold_beta,
        bandwidth=config.bandwidth,
        anneal_start=config.anneal_start,
        resample_every=config.resample_every,
        seed=config.seed,
    )


class PlainTrainer:
    """W_enc [d, m], b_enc [m], W_dec [m, d], b_dec [d], and threshold [m] or r_mag, b_mag [m] where there are some."""

    def __init__(self, setup: Setup, weights: dict[str, Tensor]) -> None:
        self.setup = setup
        self.w = {name: tensor.detach().double().clone().requires_grad_() for name, tensor in weights.items()}
        self.first = {name: torch.zeros_like(tensor) for name, tensor in self.w.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in self.w.items()}
        self.d_sae, self.d_model = self.w["W_dec"].shape
        self.silent = torch.zeros(self.d_sae, dtype=torch.int64)  # tokens since each latent fired
        self.theta = -1.0  # running threshold of the BatchTopK ones; -1 is unset
        self.p, self.next_p, self.alpha = 1.0, None, 1.0
        self.queue: list[tuple[float, float]] = []
        self.n_moves = 0
        self.n_resampled = 0
        self.t = 0

    # the codes

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations, codes and the codes that say which latents are on (gated: the gate's), all [batch, m]."""
        w, arch = self.w, self.setup.arch
        inputs = x if arch in B_DEC_NOT_SUBTRACTED else x - w["b_dec"]
        pre = inputs @ w["W_enc"] + w["b_enc"]
        on = torch.relu(pre)
        if arch == "gated":
            magnitude = torch.exp(w["r_mag"]) * (inputs @ w["W_enc"]) + w["b_mag"]
            return pre, (pre > 0) * torch.relu(magnitude), on
        if arch == "jumprelu":
            f = pre * (pre > w["threshold"].detach())
            return pre, f, f
        if arch in ("topk", "batchtopk", "matryoshka"):
            values = on.detach() if arch == "topk" else on.detach().reshape(1, -1)
            n_kept = self.setup.k if arch == "topk" else self.setup.k * len(x)
            last = values.sort(dim=1, descending=True).values[:, n_kept - 1 : n_kept]
            kept = on * (values >= last).reshape(on.shape)  # all of a tie: rows may come twice in a batch
            return pre, kept, kept
        return pre, on, on

    # the losses

    def squared_error(self, x: Tensor, f: Tensor, n_latents: int) -> Tensor:
        reconstruction = f[:, :n_latents] @ self.w["W_dec"][:n_latents] + self.w["b_dec"]
        return ((x - reconstruction) ** 2).sum(1).mean()

    def loss(self, x: Tensor, pre: Tensor, f: Tensor, gate: Tensor) -> Tensor:
        setup, warm = self.setup, self.sparsity_scale()
        error = self.squared_error(x, f, self.d_sae)
        if setup.arch == "standard":
            return error + setup.penalty * warm * f.sum(1).mean()
        if setup.arch == "standard_april":
            return error + setup.penalty * warm * (f * self.w["W_dec"].norm(dim=1)).sum(1).mean()
        if setup.arch == "p_anneal":
            return error + setup.penalty * self.alpha * warm * self.lp(f, self.p)
        if setup.arch == "gated":
            alone = gate @ self.w["W_dec"].detach() + self.w["b_dec"].detach()
            return error + setup.penalty * warm * gate.sum(1).mean() + ((x - alone) ** 2).sum(1).mean()
        if setup.arch == "jumprelu":
            l0 = (f > self.w["threshold"]).double().sum(1).mean()
            return error + warm * (l0 / setup.k - 1) ** 2
        if setup.arch == "matryoshka":  # weights of 1/5 and a mean over five
            ends = [self.d_sae // 32, 3 * self.d_sae // 32, 7 * self.d_sae // 32, 15 * self.d_sae // 32, self.d_sae]
            error = torch.stack([self.squared_error(x, f, end) / 5 for end in ends]).mean()
        return error + self.auxiliary(x, pre, f) / 32

    @staticmethod
    def lp(f: Tensor, p: float) -> Tensor:
        """Sum of f ** p, with the slope bounded near 0 by an epsilon of 1e-4."""
        return (f * (f + 1e-4) ** (p - 1)).sum(1).mean()

    def auxiliary(self, x: Tensor, pre: Tensor, f: Tensor) -> Tensor:
        """The dead latents' best d / 2 on the residual, over the residual's variance."""
        dead = (self.silent >= self.setup.dead_tokens).nonzero().squeeze(1).tolist()
        if not dead:
            return torch.zeros((), dtype=torch.float64)
        residual = (x - f @ self.w["W_dec"] - self.w["b_dec"]).detach()
        on = torch.relu(pre[:, dead])
        n_used = min(self.d_model // 2, len(dead))
        last = on.detach().sort(dim=1, descending=True).values[:, n_used - 1 : n_used]
        used = on * (on >= last)
        error = ((residual - used @ self.w["W_dec"][dead]) ** 2).sum(1).mean()
        return error / ((residual - residual.mean(0)) ** 2).sum(1).mean()

    def threshold_gradient(self, x: Tensor, pre: Tensor, f: Tensor) -> Tensor:
        """Pseudo-derivatives with a rectangle: -(theta / width) where f jumps, -(1 / width) where the count does."""
        theta, width = self.w["threshold"].detach(), self.setup.bandwidth
        residual = x - f @ self.w["W_dec"] - self.w["b_dec"]
        of_f = -2 * residual @ self.w["W_dec"].T / len(x)  # d error / d f
        l0 = (f > theta).double().sum(1).mean()
        of_count = 2 * self.sparsity_scale() * (l0 / self.setup.k - 1) / self.setup.k / len(x)
        near_pre = ((pre - theta).abs() < width / 2).double()
        near_f = ((f - theta).abs() < width / 2).double()
        return (-theta / width * near_pre * of_f - near_f * of_count / width).sum(0).detach()

    # schedules

    def sparsity_scale(self) -> float:
        return min(self.t / self.setup.sparsity_warmup_steps, 1.0)

    def learning_rate(self) -> float:
        setup = self.setup
        rate = setup.lr * min(self.t / setup.warmup_steps, 1.0)
        if self.t > setup.decay_start:
            rate *= (setup.n_steps - self.t) / (setup.n_steps - setup.decay_start)
        return rate

    def move_p(self, f: Tensor) -> None:
        """After the loss: p follows a line in ten moves, alpha keeps the penalty's size."""
        setup, n = self.setup, self.setup.n_sparsity_updates
        moves = [setup.anneal_start + int(i * (setup.n_steps - setup.anneal_start) / (n - 1)) for i in range(n)]
        powers = [1 + i * (setup.p_end - 1) / (n - 1) for i in range(n)]
        if self.next_p is not None:
            self.queue.append((self.lp(f, self.p).item(), self.lp(f, self.next_p).item()))
            self.queue = self.queue[-setup.queue_length :]
        if self.n_moves < n and self.t == moves[self.n_moves]:
            if self.next_p is not None:
                self.alpha *= sum(now for now, _ in self.queue) / sum(then for _, then in self.queue)
            self.p = powers[self.n_moves]
            self.next_p = powers[self.n_moves + 1] if self.n_moves + 1 < n else setup.p_end
            self.n_moves += 1

    # one step

    def step(self, x: Tensor) -> float:
        """One update; gives the loss before it."""
        setup, x = self.setup, x.double()
        pre, f, gate = self.codes(x)
        fired = (f > 0).any(0)
        self.silent = torch.where(fired, 0, self.silent + len(x))
        loss = self.loss(x, pre, f, gate)
        names = [name for name in self.w if name != "threshold"]
        gradients = dict(zip(names, torch.autograd.grad(loss, [self.w[name] for name in names]), strict=True))
        if setup.arch == "jumprelu":
            gradients["threshold"] = self.threshold_gradient(x, pre, f)
        errors = ((x - f @ self.w["W_dec"] - self.w["b_dec"]) ** 2).sum(1).detach()
        with torch.no_grad():
            self.update(gradients)
            if setup.arch == "jumprelu":
                self.w["threshold"].clamp_(min=0.0)  # ours alone: dictionary_learning lets it fall below 0
            if setup.arch in ("batchtopk", "matryoshka") and self.t > setup.threshold_start and fired.any():
                smallest, beta = f[f > 0].min().item(), setup.threshold_beta
                self.theta = smallest if self.theta < 0 else beta * self.theta + (1 - beta) * smallest
            if setup.arch == "p_anneal":
                self.move_p(f)
            if setup.resample_every and (self.t + 1) % setup.resample_every == 0 and self.t < setup.decay_start:
                self.resample(x, errors)
        self.t += 1
        return loss.item()

    def update(self, gradients: dict[str, Tensor]) -> None:
        arch, decoder = self.setup.arch, self.w["W_dec"]
        if arch in UNIT_DECODER:
            directions = decoder / decoder.norm(dim=1, keepdim=True)
            along = (gradients["W_dec"] * directions).sum(1, keepdim=True)
            gradients["W_dec"] = gradients["W_dec"] - along * directions
        if arch in CLIPPED:
            norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients.values()))
            gradients = {name: gradient * min(1.0, 1.0 / (norm + 1e-6)) for name, gradient in gradients.items()}
        self.adam(gradients, 0.0 if arch in WITHOUT_FIRST_MOMENT else 0.9, 0.999)
        if arch in UNIT_DECODER:
            decoder /= decoder.norm(dim=1, keepdim=True)

    def adam(self, gradients: dict[str, Tensor], beta_1: float, beta_2: float) -> None:
        for name, gradient in gradients.items():
            self.first[name] = beta_1 * self.first[name] + (1 - beta_1) * gradient
            self.second[name] = beta_2 * self.second[name] + (1 - beta_2) * gradient**2
            mean = self.first[name] / (1 - beta_1 ** (self.t + 1))
            square = self.second[name] / (1 - beta_2 ** (self.t + 1))
            self.w[name] -= self.learning_rate() * mean / (square.sqrt() + 1e-8)

    def resample(self, x: Tensor, errors: Tensor) -> None:
        """Latents silent since the last time start again from rows drawn by the square of their loss."""
        dead = [i for i in range(self.d_sae) if self.silent[i] >= self.setup.resample_every * len(x)]
        living = [i for i in range(self.d_sae) if i not in dead]
        n = min(len(dead), int((errors > 0).sum()))
        if n == 0:
            return
        generator = torch.Generator().manual_seed(derive_seed("train/resample", self.setup.seed, self.t))
        rows = torch.multinomial(errors**2, n, replacement=False, generator=generator).tolist()
        length = self.w["W_enc"][:, living or dead].norm(dim=0).mean()
        for i, row in zip(dead, rows, strict=False):
            direction = x[row] / x[row].norm()
            self.w["W_dec"][i] = direction
            self.w["W_enc"][:, i] = 0.2 * length * direction
            for moments in (self.first, self.second):
                moments["W_dec"][i] = 0
                moments["W_enc"][:, i] = 0
            for name in ("b_enc", "r_mag", "b_mag"):
                if name in self.w:
                    self.w[name][i] = 0
                    self.first[name][i] = self.second[name][i] = 0
            self.silent[i] = 0
            self.n_resampled += 1

    # after training

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and reconstruction of rows, as in training."""
        with torch.no_grad():
            _, f, _ = self.codes(x.double())
            return f, f @ self.w["W_dec"] + self.w["b_dec"]
