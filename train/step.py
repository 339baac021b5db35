"""One SAE in training: its state, and one step of it."""

from typing import Any

import torch
from torch import Tensor

from cache_spec.errors import UserError
from train.config import RunConfig
from train.kernels._select import Kernel
from train.names import find, parse_setting
from train.recipe import Forward, Recipe, StepView
from train.sae import SparseAutoencoder, geometric_median, initialise


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe of a run's architecture. Raises UserError for an unknown name or a k that does not fit."""
    build = getattr(find("architectures", config.arch), config.arch)
    recipe: Recipe = build(config.d_sae, config.k)
    if recipe.uses_k and not 1 <= config.k <= config.d_sae:
        raise UserError(f"--k {config.k} is not between 1 and --d-sae {config.d_sae}")
    return recipe


def penalties_of(config: RunConfig, recipe: Recipe) -> dict[str, float]:
    """Penalty names and coefficients: the architecture's own, changed and added to by the run's."""
    changes = dict(parse_setting(text, "penalty") for text in config.penalties)
    penalties = {**dict(recipe.penalties), **changes}
    for name in penalties:
        find("penalties", name)
    return penalties


def learning_rate(config: RunConfig, step: int, n_steps: int) -> float:
    """The rate at a step counted from 0: up from 0, constant, down to 0 at the end."""
    rise = min(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    fall = (n_steps - step) / (n_steps - config.decay_start) if step > config.decay_start else 1.0
    return config.lr * min(rise, fall)


class TrainRun:
    """An SAE, its optimiser and its counters; `step` trains on one batch of normalised rows."""

    def __init__(
        self,
        config: RunConfig,
        d_model: int,
        n_steps: int,
        kernel: Kernel,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.n_steps, self.kernel = config, n_steps, kernel
        self.recipe = recipe_of(config)
        self._penalties = [
            (getattr(find("penalties", name), name), coefficient)
            for name, coefficient in penalties_of(config, self.recipe).items()
            if coefficient
        ]
        self.sae = SparseAutoencoder(
            d_model,
            config.d_sae,
            self.recipe.activation,
            self.recipe.prefixes,
            subtract_b_dec=self.recipe.subtract_b_dec,
            dtype=dtype,
        )
        initialise(
            self.sae,
            config.seed,
            entries=self.recipe.init_entries,
            norm=self.recipe.init_norm,
            threshold=self.recipe.init_threshold,
        )
        self.sae.to(device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.lr, betas=self.recipe.betas, fused=True)
        self.n_done = 0  # steps
        self.silent_tokens = torch.zeros(config.d_sae, dtype=torch.int64, device=device)  # since each latent fired
        self._no_dead_until = config.dead_tokens  # tokens seen before which no latent can be dead

    def start_at(self, rows: Tensor) -> None:
        """Before the first step: take b_dec from clean rows [batch, d_model], if the architecture does."""
        assert self.n_done == 0
        if self.recipe.b_dec_from_data:
            with torch.no_grad():
                self.sae.b_dec.copy_(geometric_median(rows))

    def step(self, x: Tensor, target: Tensor) -> tuple[Forward, Tensor]:
        """One update on rows [batch, d_model]; gives what came out before it and the loss (a scalar on the device)."""
        forward = self.kernel.forward(self.sae, x)
        dead = self._count_silence(forward.f)
        scale = min(self.n_done / self.config.sparsity_warmup_steps, 1.0) if self.config.sparsity_warmup_steps else 1.0
        view = StepView(
            sae=self.sae, x=x, target=target, forward=forward, dead=dead, sparsity_scale=scale, k=self.config.k
        )
        loss = nested_error(forward.reconstructions, target)
        for penalty, coefficient in self._penalties:
            loss = loss + coefficient * penalty(view)
        loss.backward()
        self._update()
        self._move_threshold(forward.smallest)
        self.n_done += 1
        return forward, loss.detach()

    @torch.no_grad()
    def _count_silence(self, f: Tensor) -> Tensor | None:
        """Count tokens since each latent fired; the numbers of the dead latents, None if there are none.

        The device is only asked when a latent can be dead by now: the longest silence so far bounds all later ones.
        """
        n_rows = f.shape[0]
        self.silent_tokens += n_rows
        self.silent_tokens.masked_fill_(f.amax(0) > 0, 0)
        n_tokens = (self.n_done + 1) * n_rows
        if n_tokens < self._no_dead_until:
            return None
        longest = int(self.silent_tokens.max())
        self._no_dead_until = n_tokens + self.config.dead_tokens - longest
        if longest < self.config.dead_tokens:
            return None
        return self.dead().nonzero().squeeze(1)

    def dead(self) -> Tensor:
        """[d_sae] bool: latents that have been silent for `dead_tokens`."""
        return self.silent_tokens >= self.config.dead_tokens

    @torch.no_grad()
    def _update(self) -> None:
        W_dec = self.sae.W_dec
        gradient = W_dec.grad
        assert gradient is not None
        # the part of the gradient along a decoder row would only change its length, which is fixed
        along = (gradient * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True)
        gradient.addcmul_(W_dec, along, value=-1.0)
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.recipe.clip_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.n_done, self.n_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def _move_threshold(self, smallest: Tensor | None) -> None:
        threshold = self.sae.threshold
        if smallest is None or threshold is None or self.n_done <= self.config.threshold_start:
            return
        beta = self.config.threshold_beta
        moved = torch.where(threshold < 0, smallest, beta * threshold + (1 - beta) * smallest)
        threshold.copy_(torch.where(smallest.isfinite(), moved, threshold))  # infinite: nothing was active

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        return {**tensors, "silent_tokens": self.silent_tokens}

    def restore(self, tensors: dict[str, Tensor], n_done: int) -> None:
        """Take up `state` as it was after `n_done` steps."""
        device = self.silent_tokens.device
        self.sae.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("sae.")})
        for name, parameter in self.sae.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            moments: dict[str, Any] = {key: tensors[f"adam.{name}.{key}"].to(device).clone() for key in keys}
            self.optimizer.state[parameter] = moments
        self.silent_tokens = tensors["silent_tokens"].to(device).clone()
        self.n_done = n_done


def nested_error(reconstructions: list[Tensor], target: Tensor) -> Tensor:
    """Squared error: summed over d_model, averaged over rows and prefixes, each prefix weighted by 1 / their number.

    The weight is dictionary_learning's (1/25 of the sum for five prefixes); it decides how much AuxK counts.
    """
    errors = [(target - reconstruction).square().sum() for reconstruction in reconstructions]
    return torch.stack(errors).sum() / (target.shape[0] * len(errors) ** 2)
