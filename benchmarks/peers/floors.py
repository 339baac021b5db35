"""No training at all: the products that a step consists of, alone, and the speed of memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.job import Job, Unsuitable, use_tensor_cores

N_COPIED = 1 << 28  # bytes, far more than a cache holds


class Floor:
    """Calls one function as its step."""

    def __init__(self, run: Callable[[Tensor], object], settings: str) -> None:
        self.settings, self.versions, self._run = settings, {"torch": str(torch.__version__)}, run

    @torch.no_grad()
    def step(self, x: Tensor) -> object:
        return self._run(x)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(x)

    def n_dead(self) -> int:
        return 0


def build(job: Job, x: Tensor) -> Floor:
    """`encoder`: the product that any step needs. `five`: it and decoder, both weights' and the codes' gradients."""
    use_tensor_cores(job)
    if job.variant == "copy":
        source = torch.ones(N_COPIED, dtype=torch.uint8, device=job.device)
        target = torch.empty_like(source)
        return Floor(lambda _: target.copy_(source), f"{2 * N_COPIED >> 20} MiB read and written")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(job.d_model, job.d_sae, generator=generator).to(device=job.device, dtype=dtype)
    if job.variant == "encoder":
        codes = torch.empty(job.batch, job.d_sae, dtype=dtype, device=job.device)
        batches: dict[int, Tensor] = {}

        def encode(rows: Tensor) -> None:
            # the cast is no part of the product
            torch.mm(batches.setdefault(id(rows), rows.to(dtype)), weight, out=codes)

        return Floor(encode, "x W_enc, nothing else")
    if job.variant == "five":
        return Floor(five_products(x.to(dtype), weight), "x W_enc, f W_dec, fT e, e W_decT, xT df; nothing else")
    raise Unsuitable(f"there is no floor called {job.variant}")


def five_products(x: Tensor, weight: Tensor) -> Callable[[Tensor], None]:
    """The products of a dense step on ready operands, each into a buffer that is there."""
    batch, (d_model, d_sae) = len(x), weight.shape
    W_dec = weight.t().contiguous()
    f, df = x.new_empty(batch, d_sae), x.new_empty(batch, d_sae)
    made, dW_dec, dW_enc = x.new_empty(batch, d_model), torch.empty_like(W_dec), torch.empty_like(weight)

    def products(_: Tensor) -> None:
        torch.mm(x, weight, out=f)
        torch.mm(f, W_dec, out=made)
        torch.mm(f.t(), x, out=dW_dec)
        torch.mm(x, W_dec.t(), out=df)
        torch.mm(x.t(), df, out=dW_enc)

    return products
