"""The sparse kernel in plain torch: one dense product, the encoder's; all else touches only the codes that are on.

Gradients are written out by hand. With e the residual of a row and f its codes, the loss |e|^2 has the gradient
-2 W_dec e in the codes and -2 f e in the decoder rows, both only where codes are on: gathers, and sums by row and by
latent, in the place of four dense products (Gao et al. 2024 decode so). The arithmetic is that of `dense`.
"""

from functools import partial

import torch
from torch import Tensor

from train.activations import BatchTopK, JumpReLU, TopK
from train.engine import Engine, Job, Outcome
from train.kernels import dense
from train.kernels._choose import Chosen, choose_batchtopk, choose_jumprelu, choose_topk
from train.kernels._cost import max_density
from train.kernels._decode import Decoded
from train.kernels._entries import by_latent
from train.kernels._fit import needs_whole_codes
from train.kernels._scratch import scratch
from train.kernels._sums import dots, weighted_sums
from train.kernels._terms import Auxiliary, auxiliary, l0_term, threshold_gradient
from train.kernels._update import Slices, Update, blocks
from train.sae import SparseAutoencoder
from train.spans import DEAD, DECODE, ENCODE, GRADIENTS, SELECT, UPDATE, WEIGHT_GRADIENTS, span
from train.step import TrainRun


def unavailable(device: str) -> str:
    """Why it cannot run on a device, empty if it can."""
    return "" if device.split(":")[0] in ("cpu", "cuda") else f"has not been tried on {device}"


def refusal(job: Job) -> str:
    """Why it cannot train a run, empty if it can."""
    return needs_whole_codes(job)


def engine(run: TrainRun) -> Engine:
    """The sparse engine of a run."""
    return Sparse(run)


class Sparse:
    """Steps on the codes that are on. While a JumpReLU's are many, early in training, its steps are dense."""

    def __init__(self, run: TrainRun) -> None:
        self._run, self._update = run, Update(run)
        self._dense = dense.engine(run)
        is_open = isinstance(run.sae.activation, JumpReLU)  # its codes may be any number
        self._density = torch.ones((), dtype=torch.float64) if is_open else None

    def step(self, x: Tensor, target: Tensor, twin: Tensor | None, paired: Tensor | None) -> Outcome:
        """As Engine says."""
        if self._density is not None and self._density > max_density(str(x.device)):
            outcome = self._dense.step(x, target, twin, paired)
        else:
            with torch.no_grad():
                outcome = self._step(x, target)
        if self._density is not None:
            self._density.fill_(outcome.n_active.item() / (len(x) * self._run.sae.d_sae))
        return outcome

    def _step(self, x: Tensor, target: Tensor) -> Outcome:
        run, sae = self._run, self._run.sae
        centred = x - sae.b_dec if sae.subtract_b_dec else x
        chosen = self._choose(centred)
        latent = chosen.entries.latent
        n_on = torch.bincount(latent if chosen.on is None else latent[chosen.on], minlength=sae.d_sae)
        with span(DECODE):
            decoded = Decoded(sae, chosen.entries, x, target)
        loss, extra = decoded.loss, None
        with span(GRADIENTS):
            of_codes, vectors = decoded.code_gradients(), {"b_dec": decoded.b_dec_gradient()}
            if chosen.on is not None:
                vectors["threshold"] = threshold_gradient(run, chosen, of_codes)
                of_codes = torch.where(chosen.on, of_codes, 0.0)
                if coefficient := run.coefficients.get("l0"):
                    penalty, gradient = l0_term(run, chosen, n_on, len(x), coefficient)
                    loss, vectors["threshold"] = loss + penalty, vectors["threshold"] + gradient
            dead, coefficient = run.count_silence(n_on > 0, len(x)), run.coefficients.get("auxk")
            if dead is not None and coefficient:
                with span(DEAD):
                    extra = auxiliary(run, dead, centred, decoded.residual, coefficient)
                    loss = loss + extra.loss
        with span(WEIGHT_GRADIENTS):
            slices, vectors["b_enc"] = self._weight_gradients(chosen, decoded, centred, of_codes, extra)
            if sae.subtract_b_dec:
                vectors["b_dec"] -= sae.W_enc @ vectors["b_enc"]
            if sae.W_skip is not None:
                vectors["W_skip"] = decoded.W_skip_gradient(x)
        with span(UPDATE):
            self._update(slices, vectors)
        return Outcome(loss=loss, reconstruction=decoded.reconstruction, n_active=n_on.sum(), smallest=chosen.smallest)

    def _choose(self, centred: Tensor) -> Chosen:
        """The codes that are on, from one dense product."""
        sae, refine = self._run.sae, None
        with span(ENCODE):
            rows, weights, b_enc = centred, sae.W_enc.t(), sae.b_enc
            if self._run.config.precision == "bf16":
                if not sae.subtract_b_dec:  # a mean that is large in a few dimensions would cost the codes their digits
                    mean = rows.mean(0)
                    rows, b_enc = rows - mean, b_enc + weights @ mean
                rows, weights, b_enc = _rounded("rows", rows), _rounded("weights", weights), b_enc.bfloat16()
                refine = partial(_exact, sae, centred)
            pre = scratch("pre", (len(rows), sae.d_sae), rows.dtype, rows.device)
            torch.mm(rows, weights.t(), out=pre).add_(b_enc)  # faster than a product on top of the biases
        with span(SELECT):
            if isinstance(sae.activation, TopK):
                return choose_topk(sae.activation, pre, refine)
            if isinstance(sae.activation, BatchTopK):
                return choose_batchtopk(sae.activation, pre, refine)
            assert isinstance(sae.activation, JumpReLU)
            assert sae.threshold is not None
            return choose_jumprelu(sae.activation, pre, sae.threshold, refine)

    def _weight_gradients(
        self, chosen: Chosen, decoded: Decoded, centred: Tensor, of_codes: Tensor, extra: Auxiliary | None
    ) -> tuple[list[Slices], Tensor]:
        """Of both weight matrices, by blocks of latents, and of b_enc [d_sae]."""
        sae, entries = self._run.sae, chosen.entries
        segments = by_latent(entries.latent, sae.d_sae)
        b_enc = torch.bincount(entries.latent, weights=of_codes, minlength=sae.d_sae).to(of_codes.dtype)
        row, key = entries.row[segments.order], decoded.key[segments.order]
        of_codes, of_rows = of_codes[segments.order], decoded.pull_weights()[segments.order]
        slices = []
        for start, end in blocks(sae.d_sae, max(sae.d_model, sae.d_out)):
            first = int(segments.starts[start])
            part = slice(first, first + int(segments.counts[start:end].sum()))
            begins = segments.starts[start:end] - first
            slices.append(
                Slices(
                    start=start,
                    end=end,
                    W_enc=weighted_sums(centred, row[part], of_codes[part], begins),
                    W_dec=weighted_sums(decoded.pulls, key[part], of_rows[part], begins),
                )
            )
        if extra is not None:
            extra.add_to(slices, b_enc)
        return slices, b_enc

    def state(self) -> dict[str, Tensor]:
        """How many codes were on at the last step, which decides how the next is done."""
        return {} if self._density is None else {"kernel.density": self._density}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """As Engine says."""
        if self._density is not None:
            self._density.copy_(tensors.get("kernel.density", torch.ones(())))


def _rounded(name: str, tensor: Tensor) -> Tensor:
    return scratch(name, tuple(tensor.shape), torch.bfloat16, tensor.device).copy_(tensor)


def _exact(sae: SparseAutoencoder, centred: Tensor, row: Tensor, latent: Tensor) -> Tensor:
    """[n]: pre-activations of rows [batch, d_model] less b_dec, only where (row, latent) says, in full precision."""
    return dots(centred, row, sae.W_enc.t(), latent) + sae.b_enc[latent]
