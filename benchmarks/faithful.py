"""Ours beside the plain statement of the same formulas (tests/plain_trainers.py), on a cache, for a fixed budget.

Both start from the same weights and see the same rows; ours trains in float32, the plain one in float64. The last two
columns are the relative difference of the weights after 50 steps, ours in float32 and, once more, in float64. In time
roundings grow into other choices of latents, and what should agree then is how good the SAEs are. In float32 jumprelu
comes to that early: of a hundred thousand codes a step some lie on an edge of its thresholds' windows of 0.001.

    python -m benchmarks.faithful --cache demo/cache.zarr [--steps 1500] [--batch-size 256]
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from cache_spec.cache import ActivationCache
from cache_spec.command import run_command
from cache_spec.errors import UserError
from tests.plain_trainers import PlainTrainer, setup_of
from train.config import DataConfig, RunConfig
from train.held_out import held_out_rows
from train.kernels import select
from train.kernels.dense import forward
from train.loader import MixedBatchLoader
from train.names import available
from train.step import TrainRun, recipe_of
from train.timetable import schedule_for

N_SCORED, N_CLOSE = 4096, 50
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclasses.dataclass(kw_only=True)
class Row:
    """One line of the table; pairs are (ours, plain)."""

    arch: str
    loss: tuple[float, float]
    """Mean over the last tenth of the steps."""
    explained: tuple[float, float]
    l0: tuple[float, float]
    of_weights: tuple[float, float]
    """Ours in float32, in float64: the largest of a tensor after 50 steps, norm of the difference over the norm."""


def compare(config: RunConfig, loader: MixedBatchLoader, scored: Tensor) -> Row:
    """Train both on the loader's clean rows and score them on the rows [n, d_model]."""
    run, precise = (
        TrainRun(config, loader.hook.d_model, loader.n_steps, select("dense", "cpu"), dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    run.start_at(loader.read(0, with_masked=False).clean)
    precise.sae.load_state_dict(run.sae.state_dict())
    plain = PlainTrainer(setup_of(config, loader.n_steps), dict(run.sae.named_parameters()))
    losses, of_weights = [], (0.0, 0.0)
    for step in range(loader.n_steps):
        x = loader.read(step, with_masked=False).clean
        loss = run.step(x, x).loss
        losses.append((loss.item(), plain.step(x)))
        if step < N_CLOSE:
            precise.step(x.double(), x.double())
            of_weights = _difference(run, plain), _difference(precise, plain)
    last = torch.tensor(losses[-max(1, loader.n_steps // 10) :]).mean(0).tolist()
    with torch.no_grad():
        made = forward(run.sae, scored)
    ours, theirs = (made.f, made.reconstructions[-1]), plain.reconstruct(scored)
    return Row(
        arch=config.arch,
        loss=(last[0], last[1]),
        explained=(_explained(scored, ours[1]), _explained(scored, theirs[1])),
        l0=(_l0(ours[0]), _l0(theirs[0])),
        of_weights=of_weights,
    )


def _difference(run: TrainRun, plain: PlainTrainer) -> float:
    pairs = [(ours.detach().double(), plain.w[name].detach()) for name, ours in run.sae.named_parameters()]
    return max(((ours - theirs).norm() / theirs.norm().clamp(min=1e-300)).item() for ours, theirs in pairs)


def _explained(x: Tensor, made: Tensor) -> float:
    return 1 - ((x - made).square().sum() / (x - x.mean(0)).square().sum()).item()


def _l0(f: Tensor) -> float:
    return (f > 0).double().sum(1).mean().item()


@app.command()
def main(
    cache: Annotated[Path, typer.Option(help="an activation cache with held-out rows")] = Path("demo/cache.zarr"),
    hook: Annotated[str, typer.Option(help="hook point; default: the cache's first")] = "",
    steps: Annotated[int, typer.Option(help="steps of each SAE")] = 1500,
    batch_size: Annotated[int, typer.Option(help="rows in a batch")] = 256,
    d_sae: Annotated[int, typer.Option(help="latents")] = 512,
    k: Annotated[int, typer.Option(help="active latents, where the architecture has a k")] = 20,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    arch: Annotated[str, typer.Option(help="architectures, with commas; default: all")] = "",
) -> None:
    """Print loss, explained variance and L0 of ours beside the plain statement's, for each architecture."""
    opened = ActivationCache.open(cache)
    data = DataConfig(hook=hook or opened.plan.hooks[0].name, n_tokens=steps * batch_size, batch_size=batch_size)
    loader = MixedBatchLoader(opened, data, with_masked=False)
    scored = held_out_rows(loader)
    if scored is None:
        raise UserError(f"{cache} has no held-out rows to score on; harvest one with --held-out")
    schedule = dataclasses.asdict(schedule_for(loader))
    print(f"{loader.n_steps} steps of {batch_size} rows, d_sae {d_sae}, k {k}, lr {lr:g}; ours | plain")
    print(f"{'architecture':<16}{'loss':>19}{'explained':>18}{'L0':>20}{'weights':>10}")
    for name in arch.split(",") if arch else available("architectures"):
        config = RunConfig(name=name, arch=name, d_sae=d_sae, k=k, lr=lr, **schedule)
        config = dataclasses.replace(config, k=k if recipe_of(config).uses_k else 0)
        row = compare(config, loader, scored[:N_SCORED])
        (loss, plain_loss), (explained, plain_explained), (l0, plain_l0) = row.loss, row.explained, row.l0
        print(
            f"{row.arch:<16}{loss:>9.4f} |{plain_loss:>8.4f}{explained:>9.4f} |{plain_explained:>7.4f}"
            f"{l0:>10.2f} |{plain_l0:>8.2f}{row.of_weights[0]:>10.0e} |{row.of_weights[1]:>6.0e}",
            flush=True,
        )


if __name__ == "__main__":
    run_command(app)
