"""One SAE in training: its state, and one step of it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cache_spec.errors import UserError
from train.activations import JumpReLU
from train.annealing import Annealing
from train.config import RunConfig
from train.engine import Kernel, Outcome
from train.names import find, parse_setting
from train.parallel.axis import ALONE, Spread
from train.penalties._codes import weighted_codes
from train.recipe import Forward, Recipe, StepView
from train.sae import SparseAutoencoder, geometric_median, initialise


def recipe_of(config: RunConfig, *, transcoder: bool = False) -> Recipe:
    """The recipe of a run's architecture, with what the run changes put in.

    A transcoder's b_dec belongs to the target: it is not subtracted from the input and starts at the targets' mean.
    Raises UserError for an unknown name, a k that does not fit, or something that the architecture cannot have.
    """
    build = getattr(find("architectures", config.arch), config.arch)
    recipe: Recipe = build(config.d_sae, config.k)
    if recipe.uses_k and not 1 <= config.k <= config.d_sae:
        raise UserError(f"--k {config.k} is not between 1 and --d-sae {config.d_sae}")
    if config.resample_every < 0:
        raise UserError(f"--resample-every {config.resample_every} is negative; give a number of steps, or 0 for never")
    if config.resample_every and recipe.uses_k:
        raise UserError(f"{config.arch} revives dead latents by its own means; leave --resample-every out")
    if config.p_end is not None and not 0 < config.p_end <= 1:
        raise UserError(f"--p-end {config.p_end} is not above 0 and at most 1")
    if config.aux_k < 0:
        raise UserError(f"--aux-k {config.aux_k} is negative; give a number of latents, or 0 for half of d_model")
    if config.p_updates < 2 or config.p_queue < 1:
        raise UserError(f"--p-updates {config.p_updates} is below 2, or --p-queue {config.p_queue} below 1")
    return replace(recipe, **_changes(config, recipe, transcoder))


def _changes(config: RunConfig, recipe: Recipe, transcoder: bool) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if isinstance(recipe.activation, JumpReLU):
        changes["activation"] = replace(recipe.activation, bandwidth=config.bandwidth)
    if config.beta1 is not None:
        changes["betas"] = (config.beta1, recipe.betas[1])
    if config.clip_norm is not None:
        changes["clip_norm"] = config.clip_norm or None
    if config.p_end is not None:
        changes["p_end"] = config.p_end
    if config.decoder:
        changes["decoder"] = config.decoder
    if config.init_b_dec or transcoder:
        changes["init_b_dec"] = config.init_b_dec or "mean"
    if transcoder:
        changes["subtract_b_dec"] = False
    return changes


def penalties_of(config: RunConfig, recipe: Recipe) -> dict[str, float]:
    """Penalty names and coefficients: the architecture's own, changed and added to by the run's."""
    changes = dict(parse_setting(text, "penalty") for text in config.penalties)
    penalties = {**dict(recipe.penalties), **changes}
    for name in penalties:
        find("penalties", name)
    return penalties


def try_penalties(config: RunConfig, recipe: Recipe) -> None:
    """Raises UserError for a negative coefficient; a penalty may refuse the architecture, tried on one latent."""
    sae = SparseAutoencoder(1, 1, recipe.activation, subtract_b_dec=False, gated=recipe.gated)
    x = torch.zeros(1, 1)
    gate = x if recipe.gated else None
    view = StepView(
        sae=sae,
        x=x,
        target=x,
        forward=Forward(f=x, reconstructions=[x], smallest=None, gate=gate),
        dead=None,
        sparsity_scale=0.0,
        k=1,
    )
    for name, coefficient in penalties_of(config, recipe).items():
        if coefficient < 0:
            raise UserError(f"--penalty {name}={coefficient:g} is negative; give a coefficient of 0 or more")
        if coefficient:
            getattr(find("penalties", name), name)(view)


def new_sae(
    recipe: Recipe,
    d_model: int,
    d_sae: int,
    seed: int,
    *,
    d_out: int | None = None,
    skip: bool = False,
    dtype: torch.dtype = torch.float32,
    spread: Spread = ALONE,
) -> SparseAutoencoder:
    """An SAE (with `d_out`, a transcoder) of a recipe, at its start but for what b_dec takes from data."""
    sae = SparseAutoencoder(
        d_model,
        d_sae,
        recipe.activation,
        recipe.prefixes,
        subtract_b_dec=recipe.subtract_b_dec,
        gated=recipe.gated,
        d_out=d_out,
        skip=skip,
        dtype=dtype,
        spread=spread,
    )
    initialise(sae, seed, entries=recipe.init_entries, norm=recipe.init_norm, threshold=recipe.init_threshold)
    return sae


def learning_rate(config: RunConfig, step: int, n_steps: int) -> float:
    """The rate at a step counted from 0: up from 0, constant, down to 0 at the end."""
    rise = min(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    fall = (n_steps - step) / (n_steps - config.decay_start) if step > config.decay_start else 1.0
    return config.lr * min(rise, fall)


class TrainRun:
    """An SAE, its optimiser and its counters; `step` trains on one batch of normalised rows.

    With `d_out` it is a transcoder, even if that equals d_model.
    """

    def __init__(
        self,
        config: RunConfig,
        d_model: int,
        n_steps: int,
        kernel: Kernel,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        d_out: int | None = None,
        spread: Spread = ALONE,
    ) -> None:
        self.config, self.n_steps, self.spread = config, n_steps, spread
        self.recipe = recipe_of(config, transcoder=d_out is not None)
        self.coefficients = {name: value for name, value in penalties_of(config, self.recipe).items() if value}
        self.penalties = [(getattr(find("penalties", name), name), value) for name, value in self.coefficients.items()]
        self.sae = new_sae(
            self.recipe, d_model, config.d_sae, config.seed, d_out=d_out, skip=config.skip, dtype=dtype, spread=spread
        ).to(device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.lr, betas=self.recipe.betas, fused=True)
        self.annealing = None
        if "lp" in self.coefficients and self.recipe.p_end is not None:
            self.annealing = Annealing(
                start=config.anneal_start,
                n_steps=n_steps,
                p_end=self.recipe.p_end,
                n_updates=config.p_updates,
                n_queue=config.p_queue,
                dtype=dtype,
                device=device,
            )
        self.n_done = 0  # steps
        self.silent_tokens = torch.zeros(len(self.sae.b_enc), dtype=torch.int64, device=device)  # since each fired
        self._no_dead_until = config.dead_tokens  # tokens seen before which no latent can be dead
        self.kernel = kernel
        self._engine = kernel.engine(self)

    @torch.no_grad()
    def start_at(self, x: Tensor, target: Tensor | None = None) -> None:
        """Before the first step: take b_dec from clean rows [batch, d_model], if the architecture does.

        A transcoder takes it from the same rows' targets [batch, d_out].
        """
        assert self.n_done == 0
        rows = x if target is None else target
        if self.recipe.init_b_dec == "median":
            self.sae.b_dec.copy_(geometric_median(rows))
        elif self.recipe.init_b_dec == "mean":
            self.sae.b_dec.copy_(rows.mean(0))
        for axis in (self.spread.rows, self.spread.latents):
            axis.first(self.sae.b_dec)  # another machine may have rounded it otherwise

    def step(self, x: Tensor, target: Tensor, twin: Tensor | None = None, paired: Tensor | None = None) -> Outcome:
        """One update on rows [batch, d_model]; gives what came out before it.

        `twin` [batch, d_model] are the same rows in their other view, and `paired` [batch] bool says whose own token
        is the same in both; the run's consistency needs them.
        """
        outcome = self._engine.step(x, target, twin, paired)
        self._move_threshold(outcome.smallest)
        self.n_done += 1
        return outcome

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.config, self.n_done, self.n_steps)

    @property
    def sparsity_scale(self) -> float:
        """How far sparsity penalties are warmed up, 0 to 1."""
        warmup = self.config.sparsity_warmup_steps
        return min(self.n_done / warmup, 1.0) if warmup else 1.0

    def observe(self, view: StepView) -> None:
        """Let the annealing of a power see the codes of a step."""
        if self.annealing is not None:
            self.annealing.observe(weighted_codes(view), self.n_done, self.spread)

    def count_silence(self, fired: Tensor, n_rows: int) -> Tensor | None:
        """Count tokens since each latent fired ([d_sae] bool); the numbers of the dead latents, None without any.

        Where latents are spread over processes both are of this process's own, and "without any" is of all.

        The device is only asked when a latent can be dead by now: the longest silence so far bounds all later ones.
        """
        self.silent_tokens += n_rows
        self.silent_tokens.masked_fill_(fired, 0)
        n_tokens = (self.n_done + 1) * n_rows
        if n_tokens < self._no_dead_until:
            return None
        longest = int(self.spread.latents.largest(self.silent_tokens.max()))
        self._no_dead_until = n_tokens + self.config.dead_tokens - longest
        if longest < self.config.dead_tokens:
            return None
        return self.dead().nonzero().squeeze(1)

    def dead(self) -> Tensor:
        """[d_sae] bool: latents that have been silent for `dead_tokens`."""
        return self.silent_tokens >= self.config.dead_tokens

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
        annealing = {} if self.annealing is None else self.annealing.state()
        return {**tensors, **annealing, **self._engine.state(), "silent_tokens": self.silent_tokens}

    def restore(self, tensors: dict[str, Tensor], n_done: int) -> None:
        """Take up `state` as it was after `n_done` steps. Raises KeyError or RuntimeError for that of another run."""
        self._check_state(tensors)
        device = self.silent_tokens.device
        self.sae.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("sae.")})
        for name, parameter in self.sae.named_parameters():
            moments: dict[str, Any] = {"step": tensors[f"adam.{name}.step"].to(device).clone()}
            for key in ("exp_avg", "exp_avg_sq"):  # in the layout of the parameter, whatever the file has
                moments[key] = torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"adam.{name}.{key}"])
            self.optimizer.state[parameter] = moments
        self.silent_tokens = tensors["silent_tokens"].to(device).clone()
        if self.annealing is not None:
            self.annealing.restore(tensors)
        self._engine.restore(tensors)
        self.n_done = n_done

    def _check_state(self, tensors: dict[str, Tensor]) -> None:
        """Copying would stretch a tensor of another shape, and throw away a part of one of another type."""
        wanted = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            wanted |= {f"adam.{name}.exp_avg": parameter, f"adam.{name}.exp_avg_sq": parameter}
            wanted[f"adam.{name}.step"] = torch.zeros((), dtype=torch.float32)
        wanted |= {} if self.annealing is None else self.annealing.state()
        for name, like in (wanted | {"silent_tokens": self.silent_tokens}).items():
            found = tensors[name]
            if found.shape != like.shape or found.dtype != like.dtype:
                raise RuntimeError(
                    f"its {name} is {list(found.shape)} of {found.dtype}, not {list(like.shape)} of {like.dtype}"
                )
