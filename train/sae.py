"""The sparse autoencoder. There is one: an architecture is an activation, penalties and prefixes."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from cache_spec.seeds import derive_seed
from train.activations import FIXED, TRAINED, Activation, Threshold

UNSET = -1.0  # a running threshold before its first value


class SparseAutoencoder(nn.Module):
    """d_model activations to d_sae sparse codes and back.

    W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model]; `threshold` is None, a scalar
    or [d_sae], in the units of the pre-activations. `prefixes` are the numbers of latents, rising to d_sae, that
    must each reconstruct alone (one of them for a plain SAE).
    """

    threshold: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        activation: Activation,
        prefixes: tuple[int, ...] = (),
        *,
        subtract_b_dec: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.d_model, self.d_sae = d_model, d_sae
        self.activation = activation
        self.prefixes = prefixes or (d_sae,)
        assert self.prefixes[-1] == d_sae
        assert list(self.prefixes) == sorted(set(self.prefixes))
        self.subtract_b_dec = subtract_b_dec
        self.W_enc = nn.Parameter(torch.zeros(d_model, d_sae, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_model, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_model, dtype=dtype))
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

    def encode(self, x: Tensor) -> Tensor:
        """[batch, d_model] -> [batch, d_sae], as the finished SAE does it: no row depends on another."""
        return self.activation.infer(self.pre_activations(x), self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        """[batch, d_sae] -> [batch, d_model]."""
        return functional.linear(f, self.W_dec.t(), self.b_dec)

    def decode_prefixes(self, f: Tensor) -> list[Tensor]:
        """[batch, d_sae] -> one reconstruction [batch, d_model] per prefix, as running sums of the groups between."""
        if len(self.prefixes) == 1:
            return [self.decode(f)]
        sizes = [end - start for start, end in zip((0, *self.prefixes), self.prefixes, strict=False)]
        reconstructions: list[Tensor] = []
        total = self.b_dec
        for codes, rows in zip(f.split(sizes, dim=-1), self.W_dec.split(sizes), strict=True):
            total = torch.addmm(total, codes, rows)
            reconstructions.append(total)
        return reconstructions

    def forward(self, x: Tensor) -> Tensor:
        """[batch, d_model] -> its reconstruction [batch, d_model]."""
        return self.decode(self.encode(x))

    def with_threshold(self, threshold: float | Tensor) -> "SparseAutoencoder":
        """An SAE with the same weights (shared) that keeps the positive pre-activations above `threshold`."""
        other = copy.copy(self)
        other._parameters, other._buffers = dict(self._parameters), dict(self._buffers)
        other._parameters.pop("threshold", None)
        other.activation = Threshold()
        value = torch.as_tensor(threshold, dtype=self.b_enc.dtype, device=self.b_enc.device)
        other._buffers["threshold"] = value.detach()
        return other


@torch.no_grad()
def initialise(sae: SparseAutoencoder, seed: int, *, entries: str, norm: float, threshold: float = 0.0) -> None:
    """Random decoder rows of one norm, from uniform or normal entries; encoder tied to them; biases zero.

    The same seed and sizes give the same weights, whatever the device.
    """
    generator = torch.Generator().manual_seed(derive_seed("train/init", seed))
    rows = torch.empty(sae.d_sae, sae.d_model)
    rows = rows.normal_(generator=generator) if entries == "normal" else rows.uniform_(-1, 1, generator=generator)
    rows *= norm / rows.norm(dim=1, keepdim=True)
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(rows.t())
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    if sae.threshold is not None and sae.activation.threshold == TRAINED:
        sae.threshold.fill_(threshold)


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
