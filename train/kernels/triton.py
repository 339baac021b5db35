"""The kernel in Triton, for CUDA: pre-activations stay on the chip, and a step is three CUDA graphs.

The first finds the codes, and what it found goes to the host while the second decodes them and makes the gradients;
only then, when the host knows that nothing was left out, does the third change the weights. Where candidates did not
fit or did not suffice the search is done anew with more room or a lower bound, at last by the dense kernel. The
arithmetic is that of `dense`.
"""

import importlib.util
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.activations import BatchTopK, JumpReLU, TopK
from train.engine import Engine, Job, Outcome
from train.kernels import dense
from train.kernels._cost import max_density
from train.kernels._fit import needs_whole_codes
from train.kernels._triton_blocks import HALF, SINGLE, TINY, Found, Sizes, power_of_2
from train.step import TrainRun

if TYPE_CHECKING:
    from train.kernels._triton_work import Work

_ATTEMPTS = 4
_LOOK = 8  # steps between two looks at how dense codes are, while steps are dense
_SAMPLE = 128  # rows that the first bound is taken from


def unavailable(device: str) -> str:
    """Why it cannot run on a device; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "" if device == "cpu" else f"is in its interpreter (TRITON_INTERPRET=1), which is for cpu, not {device}"
    if not device.startswith("cuda"):
        return f"is for CUDA, not for {device}"
    return "" if torch.cuda.is_available() else "needs a CUDA device, and torch finds none"


def refusal(job: Job) -> str:
    """Why it cannot train a run, empty if it can."""
    if job.config.skip:
        return "--skip adds a path that it does not have"
    return needs_whole_codes(job)


def engine(run: TrainRun) -> Engine:
    """The Triton engine of a run."""
    return Triton(run)


class Triton:
    """Steps on the codes that are on."""

    def __init__(self, run: TrainRun) -> None:
        assert run.sae.W_enc.dtype == torch.float32, "weights are in float32"
        self._run, self._dense = run, dense.engine(run)
        self._device = run.sae.W_enc.device
        if self._device.type == "cuda":
            self._blocks = HALF if run.config.precision == "bf16" else SINGLE
        else:
            self._blocks = TINY
        self._work: Work | None = None
        self._addresses: tuple[int, ...] = ()
        self._sizes: Sizes | None = None
        self._level = torch.zeros(1, device=self._device)
        self._gap, self._knows_level = 0.15, False
        self._is_jump = isinstance(run.sae.activation, JumpReLU)
        self._has_level = isinstance(run.sae.activation, BatchTopK)
        self._is_dense = self._is_jump  # until we know better: thresholds start where half of all codes are on
        self.n_dense = 0  # steps so far that were dense
        self.n_again = 0  # searches that had to be repeated
        self._event: Any = torch.cuda.Event() if self._device.type == "cuda" else None
        pinned = self._device.type == "cuda"
        self._numbers = torch.zeros(4, pin_memory=pinned)
        self._facts = torch.zeros(5, dtype=torch.int64, pin_memory=pinned)

    def step(self, x: Tensor, target: Tensor, twin: Tensor | None, paired: Tensor | None) -> Outcome:
        """As Engine says."""
        if not self._is_dense:
            with torch.no_grad():
                work = self._search(x, target)
                if work is not None:
                    return self._finish(work)
        return self._step_densely(x, target)

    def _search(self, x: Tensor, target: Tensor) -> "Work | None":
        """The run's buffers with codes and gradients in them; None if the codes could not be found."""
        for _ in range(_ATTEMPTS):
            work = self._ready(x, target)
            work.search()
            if self._event is not None:
                self._facts.copy_(work.inputs.found, non_blocking=True)
                self._event.record()
                work.decode()  # meanwhile
                self._event.synchronize()
            else:
                self._facts.copy_(work.inputs.found)
            found = Found.of(self._facts)
            if found.fits(work.sizes, by_row=isinstance(self._run.sae.activation, TopK)):
                if self._event is None:
                    work.decode()
                self._adapt(found, len(x))
                return work
            self.n_again += 1
            if not self._make_room(found, len(x)):
                break
        self._knows_level = False
        return None

    def _ready(self, x: Tensor, target: Tensor) -> "Work":
        """Buffers that hold this batch and what the step needs to know."""
        # here, because without the package triton this module has to say so
        from train.kernels._triton_work import Work

        run, work = self._run, self._work
        sizes = self._sizes = self._sizes or self._first_sizes(len(x))
        if work is None or work.sizes != sizes or len(work.inputs.x) != len(x) or work.addresses() != self._addresses:
            self._work = None  # its memory is free before the next asks for some
            work = self._work = Work(run, len(x), sizes, self._blocks, self._device)
            work.inputs.level.copy_(self._level)
            self._level = work.inputs.level
            self._addresses = work.addresses()
        work.inputs.x.copy_(x)
        work.inputs.target.copy_(target)
        work.follow()
        if not self._knows_level and self._has_level:
            work.inputs.level.copy_(self._sampled_level(x))
            self._knows_level = True
        lr, (beta1, beta2) = run.lr, run.recipe.betas
        run.optimizer.param_groups[0]["lr"] = lr
        n = run.n_done + work.ahead + 1
        step, root = lr / (1 - beta1**n), (1 - beta2**n) ** 0.5
        self._numbers.copy_(torch.tensor([step, root, 1 - self._gap, run.sparsity_scale]))
        work.inputs.numbers.copy_(self._numbers, non_blocking=True)
        return work

    def _finish(self, work: "Work") -> Outcome:
        run = self._run
        n_rows = len(work.inputs.x)
        dead = run.count_silence(work.n_on > 0, n_rows)
        if dead is not None:
            work.add_auxk(dead)
        work.update()
        return Outcome(
            loss=work.loss.clone(),
            reconstruction=work.reconstruction.clone(),
            n_active=work.n_on.sum(),
            smallest=work.smallest.clone() if self._has_level else None,
        )

    def _step_densely(self, x: Tensor, target: Tensor) -> Outcome:
        outcome = self._dense.step(x, target, None, None)
        self.n_dense += 1
        if self._is_jump and self._run.n_done % _LOOK == 0:
            density = int(outcome.n_active) / (len(x) * self._run.sae.d_sae)
            self._is_dense = density > 0.75 * self._most_dense()  # lower than where it turns back
        return outcome

    def _most_dense(self) -> float:
        return max_density(str(self._device))

    def _first_sizes(self, n_rows: int) -> Sizes:
        k, d_sae, blocks = self._run.config.k, self._run.sae.d_sae, self._blocks
        n_tiles = -(-d_sae // blocks.latents)
        most = n_rows * d_sae
        if self._is_jump:
            n = max(4096, int(1.5 * self._most_dense() * most))
            return Sizes(slots=8, candidates=min(n, most), row_candidates=1, codes=min(n, most))
        by_row = isinstance(self._run.sae.activation, TopK)
        return Sizes(
            slots=min(blocks.latents, max(8, power_of_2(4 * k / n_tiles))),
            candidates=min(most, max(4096, (4 if by_row else 2) * k * n_rows)),
            row_candidates=power_of_2(min(d_sae, 8 * k)),
            codes=k * n_rows if by_row else min(most, k * n_rows + 4096),  # a few may tie with the last one
        )

    def _make_room(self, found: Found, n_rows: int) -> bool:
        """Another bound or larger buffers for a search that failed; False if dense products are the better way."""
        sizes, k = self._sizes, self._run.config.k
        assert sizes is not None
        if found.most_in_cell > sizes.slots:
            sizes = replace(sizes, slots=min(self._blocks.latents, power_of_2(1.25 * found.most_in_cell)))
        if self._is_jump:
            if found.n_candidates > sizes.candidates:
                self._is_dense = True
                return False
        elif found.n_short:
            if not self._has_level:  # rows of too few positive values, or a sample that was bad twice
                return False
            self._gap, self._knows_level = min(0.9, 1.5 * self._gap), False
        elif found.n_candidates > 16 * k * n_rows or found.most_in_row > 4096:  # no number, or no bound
            return False
        else:
            if found.n_candidates > sizes.candidates:
                self._gap, self._knows_level = 0.5 * self._gap, False
                sizes = replace(sizes, candidates=power_of_2(found.n_candidates))
            sizes = replace(sizes, row_candidates=max(sizes.row_candidates, power_of_2(found.most_in_row)))
            sizes = replace(sizes, codes=max(sizes.codes, found.n_codes))
        self._sizes = sizes
        return True

    def _adapt(self, found: Found, n_rows: int) -> None:
        """Move the next bound: near the level there is little to sort out, below it little to miss."""
        if not self._has_level:
            return
        surplus = found.n_candidates / (self._run.config.k * n_rows)
        if surplus > 1.25:
            self._gap = max(0.002, 0.93 * self._gap)
        elif surplus < 1.1:
            self._gap = min(0.9, 1.15 * self._gap)

    def _sampled_level(self, x: Tensor) -> Tensor:
        """[1]: the last value that some rows of the batch keep."""
        rows = x[:: max(1, len(x) // _SAMPLE)]
        values = self._run.sae.pre_activations(rows).flatten()
        return values.topk(self._run.config.k * len(rows), sorted=False).values.amin(0, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """What decides how the next step is done."""
        sizes = self._sizes or Sizes(slots=0, candidates=0, row_candidates=0, codes=0)
        numbers = [self._gap, self._knows_level, self._is_dense]
        numbers += [sizes.slots, sizes.candidates, sizes.row_candidates, sizes.codes]
        return {
            "kernel.triton": torch.tensor(numbers, dtype=torch.float64),
            "kernel.level": self._level.detach().clone(),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """As Engine says."""
        self._work = None
        if "kernel.triton" not in tensors:
            return
        gap, knows_level, is_dense, *sizes = tensors["kernel.triton"].tolist()
        self._gap, self._knows_level, self._is_dense = gap, bool(knows_level), bool(is_dense)
        slots, candidates, row_candidates, codes = (int(size) for size in sizes)
        found = Sizes(slots=slots, candidates=candidates, row_candidates=row_candidates, codes=codes)
        self._sizes = found if slots else None
        self._level = tensors["kernel.level"].to(self._device).clone()
