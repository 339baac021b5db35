"""The sparse autoencoder. There is one: an architecture is an activation, penalties and prefixes."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from cache_spec.seeds import derive_seed
from train.activations import FIXED, TRAINED, Activation, Threshold
from train.parallel.axis import ALONE, Spread

UNSET = -1.0  # a running threshold before its first value
_ROWS_DRAWN = 8192  # a multiple of 16, in which torch makes normal numbers: so the parts are those of the whole


class SparseAutoencoder(nn.Module):
    """d_model activations to d_sae sparse codes and back.

    W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; `threshold` is None, a scalar
    or [d_sae], in the units of the pre-activations. `prefixes` are the numbers of latents, rising to d_sae, that
    must each reconstruct alone (one of them for a plain SAE).

    A gated one (Rajamanoharan et al. 2024) has r_mag and b_mag [d_sae] too: its activation only says which latents
    are on. A transcoder has a `d_out`, which an SAE leaves to be d_model, and may have W_skip [d_model, d_out], a
    linear path beside the latents (Paulo et al. 2025).

    Where latents are spread over processes each has its share of them, and codes are those of its share: there
    [batch, d_sae] is [batch, d_sae / processes]. Reconstructions are whole.
    """

    threshold: Tensor | None
    r_mag: Tensor | None
    b_mag: Tensor | None
    W_skip: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        activation: Activation,
        prefixes: tuple[int, ...] = (),
        *,
        subtract_b_dec: bool = True,
        gated: bool = False,
        d_out: int | None = None,
        skip: bool = False,
        dtype: torch.dtype = torch.float32,
        spread: Spread = ALONE,
    ) -> None:
        super().__init__()
        self.d_model, self.d_sae = d_model, d_sae
        self.spread, self.latents = spread, spread.latents.share(d_sae)
        self.d_out = d_model if d_out is None else d_out
        self.is_transcoder = d_out is not None
        assert not (subtract_b_dec and self.is_transcoder), "b_dec belongs to the target, not to the input"
        assert self.is_transcoder or not skip, "an SAE with a linear path would have nothing to learn"
        self.activation = activation
        self.prefixes = prefixes or (d_sae,)
        assert self.prefixes[-1] == d_sae
        assert list(self.prefixes) == sorted(set(self.prefixes))
        self.subtract_b_dec = subtract_b_dec
        d_sae = d_sae // spread.latents.size
        # In memory latent by latent, as W_dec is: sparse kernels gather the rows of both.
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_model, dtype=dtype).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, dtype=dtype))
        self.r_mag = nn.Parameter(torch.zeros(d_sae, dtype=dtype)) if gated else None
        self.b_mag = nn.Parameter(torch.zeros(d_sae, dtype=dtype)) if gated else None
        self.W_skip = nn.Parameter(torch.zeros(d_model, self.d_out, dtype=dtype)) if skip else None
        if activation.threshold == TRAINED:
            self.threshold = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        elif activation.threshold == FIXED:
            self.register_buffer("threshold", None)
        else:
            self.register_buffer("threshold", torch.tensor(UNSET, dtype=dtype))

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """[batch, d_model] -> [batch, d_sae], or only the given latents [n] -> [batch, n]."""
        W_enc, b_enc = self.W_enc, self.b_enc
        if latents is not None:
            W_enc, b_enc = W_enc[:, latents], b_enc[latents]
        if not self.subtract_b_dec:
            return functional.linear(x, W_enc.t(), b_enc)
        # b_dec is subtracted as a constant, and a term that is zero brings its gradient: a matrix-vector
        # product in place of the gradient with respect to x, which nobody else wants.
        b_dec = self.b_dec.detach()
        if torch.is_grad_enabled():
            b_enc = b_enc + (b_dec - self.b_dec) @ W_enc.detach()
        return functional.linear(x - b_dec, W_enc.t(), b_enc)

    def codes(self, pre: Tensor, active: Tensor) -> Tensor:
        """What the activation made of the pre-activations -> codes, both [batch, d_sae]; one and the same if not gated.

        A gated SAE lets ReLU(exp(r_mag) * (pre - b_enc) + b_mag) through where `active` is positive: its b_enc is the
        bias of the gate alone.
        """
        if self.r_mag is None or self.b_mag is None:
            return active
        magnitudes = torch.addcmul(self.b_mag, self.r_mag.exp(), pre - self.b_enc)
        return torch.where(active <= 0, 0.0, torch.relu(magnitudes))

    def encode(self, x: Tensor) -> Tensor:
        """[batch, d_model] -> [batch, d_sae], as the finished SAE does it: no row depends on another."""
        pre = self.pre_activations(x)
        return self.codes(pre, self.activation.infer(pre, self.threshold, self.spread))

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """[batch, d_sae] -> [batch, d_out]. With a skip the input x [batch, d_model] is needed too."""
        if self.spread.latents.size > 1:
            return self._added_up([f @ self.W_dec + self._offset(x)])[0]
        if self.W_skip is None:
            return functional.linear(f, self.W_dec.t(), self.b_dec)
        return f @ self.W_dec + self._offset(x)

    def _added_up(self, parts: list[Tensor]) -> list[Tensor]:
        """Reconstructions [batch, d_out] from what each process's latents add to them; one message for all of them."""
        return list(self.spread.latents.total(torch.stack(parts).to(self.b_dec.dtype)))

    def _offset(self, x: Tensor | None) -> Tensor:
        """What is reconstructed when every latent is off: b_dec, or [batch, d_out] where a skip adds to it.

        Where latents are spread, one process adds it: so its gradients are to be added up as those of a share are.
        """
        if self.spread.latents.index:
            return torch.zeros_like(self.b_dec)
        if self.W_skip is None:
            return self.b_dec
        assert x is not None, "a skip needs the input"
        return functional.linear(x, self.W_skip.t(), self.b_dec)

    def decode_prefixes(self, f: Tensor, x: Tensor | None = None) -> list[Tensor]:
        """[batch, d_sae] -> one reconstruction [batch, d_out] per prefix, as running sums of the groups between."""
        if len(self.prefixes) == 1:
            return [self.decode(f, x)]
        own = self.latents  # where latents are spread, those of a group that are here; there may be none
        ends = [min(max(end, own.start), own.stop) - own.start for end in (0, *self.prefixes)]
        sizes = [end - start for start, end in pairwise(ends)]
        reconstructions: list[Tensor] = []
        total = self._offset(x)
        for codes, rows in zip(f.split(sizes, dim=-1), self.W_dec.split(sizes), strict=True):
            total = torch.addmm(total, codes, rows)
            reconstructions.append(total)
        return reconstructions if self.spread.latents.size == 1 else self._added_up(reconstructions)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, d_model] -> its reconstruction, or what a transcoder makes of it [batch, d_out]."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def keep_threshold(self) -> None:
        """Hold a trained threshold at 0 or above.

        Below 0 it would let negative codes through in training, which no finished SAE has, and the penalty would
        count every silent latent as active.
        """
        if self.threshold is not None and self.activation.threshold == TRAINED:
            self.threshold.clamp_(min=0.0)

    def with_threshold(self, threshold: float | Tensor) -> "SparseAutoencoder":
        """An SAE with the same weights (shared) that is on where pre-activations are positive and above `threshold`."""
        other = copy.copy(self)
        other._parameters, other._buffers = dict(self._parameters), dict(self._buffers)
        other._parameters.pop("threshold", None)
        other.activation = Threshold()
        value = torch.as_tensor(threshold, dtype=self.b_enc.dtype, device=self.b_enc.device)
        other._buffers["threshold"] = value.detach()
        return other


@torch.no_grad()
def initialise(sae: SparseAutoencoder, seed: int, *, entries: str, norm: float, threshold: float = 0.0) -> None:
    """Random decoder rows of one norm, from uniform or normal entries; encoder tied to them; the rest zero.

    A transcoder's encoder reads another space than its decoder writes, so it gets rows of its own. The same seed and
    sizes give the same weights, whatever the device.
    """
    generator = torch.Generator().manual_seed(derive_seed("train/init", seed))
    _fill_rows(sae.W_dec, sae, entries, norm, generator)
    if sae.is_transcoder:
        _fill_rows(sae.W_enc.t(), sae, entries, norm, generator)
    else:
        sae.W_enc.copy_(sae.W_dec.t())
    for parameter in (sae.b_enc, sae.b_dec, sae.r_mag, sae.b_mag, sae.W_skip):
        if parameter is not None:
            parameter.zero_()
    if sae.threshold is not None and sae.activation.threshold == TRAINED:
        sae.threshold.fill_(threshold)


def _fill_rows(rows: Tensor, sae: SparseAutoencoder, entries: str, norm: float, generator: torch.Generator) -> None:
    """Draw a row of length `norm` for each of the SAE's latents, in their order, and keep those of its own latents.

    The numbers are drawn some latents at a time, so that memory need not hold an SAE that is spread over processes.
    """
    n, width, own = sae.d_sae, rows.shape[1], sae.latents
    starts = range(0, max(n - _ROWS_DRAWN, 1), _ROWS_DRAWN)
    for start, end in pairwise([*starts, n]):
        drawn = torch.empty(end - start, width)
        drawn = (
            drawn.normal_(generator=generator) if entries == "normal" else drawn.uniform_(-1, 1, generator=generator)
        )
        first, last = max(start, own.start), min(end, own.stop)
        if first < last:
            drawn = drawn[first - start : last - start]
            rows[first - own.start : last - own.start] = drawn * (norm / drawn.norm(dim=1, keepdim=True))


@torch.no_grad()
def geometric_median(rows: Tensor, max_steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point [d_model] with the least sum of distances to the rows [batch, d_model], by Weiszfeld's iteration."""
    point = rows.mean(0)
    for _ in range(max_steps):
        weights = 1.0 / (rows - point).norm(dim=1).clamp(min=1e-12)
        previous, point = point, (weights @ rows) / weights.sum()
        if (point - previous).norm() < tolerance:
            break
    return point
