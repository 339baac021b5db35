"""sparsify, from an environment: the step of its Trainer.fit around its own SparseCoder and optimisers.

The loop itself cannot be called without a language model, so its order of calls is restated here: decoder to length 1,
forward, backward, projection, optimiser, counting of what fired. Variants: "signum", its default, and "adam". Its
forward is always bf16 autocast on a GPU; on a CPU never by itself, and the autocast of the bf16 row is put around it.
"""

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.job import DEAD_TOKENS, SHRUNK, Job, Unsuitable, autocast, n_dead, use_tensor_cores


class Sparsify:
    """A sparse coder, its optimiser and its count of silence."""

    def __init__(self, coder: Any, optimizer: Any, job: Job) -> None:
        self.versions = {"torch": str(torch.__version__), "eai-sparsify": importlib.metadata.version("eai-sparsify")}
        self._alpha = 1 / 32 if job.dead else 0.0  # its default is 0: no AuxK
        words = [f"optimizer={job.variant}", "autocast" if job.precision == "bf16" else ""]
        words.append("auxk_alpha=1/32" if job.dead else "")
        self.settings = ", ".join(filter(None, words))
        self._coder, self._optimizer, self._job = coder, optimizer, job
        self.silent = torch.zeros(job.d_sae, dtype=torch.long, device=job.device)
        self._fired = torch.zeros(job.d_sae, dtype=torch.bool, device=job.device)

    def step(self, x: Tensor) -> object:
        coder = self._coder
        coder.set_decoder_norm_to_unit_norm()
        dead = self.silent > DEAD_TOKENS if self._alpha else None
        total_variance = (x - x.mean(0)).pow(2).sum()
        with autocast(self._job):
            out = coder(x=x, y=x, dead_mask=dead, total_variance=total_variance)
        self._fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # its log of the mean, kept whether anybody logs or not
        loss = out.fvu + self._alpha * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.silent += len(x)
        self.silent[self._fired] = 0
        self._fired.zero_()
        return loss

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, latents, _ = self._coder.encode(x)
        return codes, self._coder.decode(codes, latents)

    def n_dead(self) -> int:
        return int((self.silent > DEAD_TOKENS).sum())


def build(job: Job, x: Tensor) -> Sparsify:
    if job.arch != "topk":
        raise Unsuitable(f"sparsify has no {job.arch}")
    if job.device.startswith("cuda") and job.precision == "fp32":
        raise Unsuitable("sparsify is always bf16 on a GPU")
    from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sparse_coder import SparseCoder  # pyright: ignore[reportMissingImports]

    use_tensor_cores(job)
    torch.manual_seed(0)
    config = SparseCoderConfig(num_latents=job.d_sae, k=job.k)
    coder = SparseCoder(job.d_model, config, job.device, dtype=torch.float32)
    sparsify = Sparsify(coder, new_optimizer(job, coder), job)
    with torch.no_grad():
        coder.b_dec.copy_(x.mean(0))
        if dead := n_dead(job):
            coder.encoder.weight[-dead:] *= SHRUNK
            sparsify.silent[-dead:] = 2 * DEAD_TOKENS
    return sparsify


def new_optimizer(job: Job, coder: Any) -> Any:
    """As its Trainer makes it: 8-bit Adam on a GPU that has bitsandbytes, else torch's."""
    if job.variant == "adam":
        try:
            from bitsandbytes.optim import Adam8bit as Adam  # pyright: ignore[reportMissingImports]
        except ImportError:
            from torch.optim import Adam
        return Adam(coder.parameters(), lr=job.lr)
    if job.variant != "signum":
        raise Unsuitable(f"the optimisers of sparsify that are measured are signum and adam, not {job.variant}")
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
    from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]

    rate = min(job.lr, 1e-4)  # every entry moves by this much each step
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
    optimizer.train()
    return optimizer
