"""saev, from a checkout: the step of its train() around its own modules.

The function itself wants its own data loader and Weights & Biases, so its order of calls is restated here: decoder to
length 1, objective, backward, projection, clipping, fused Adam. Run-time checks of shapes are off. On a GPU it sets
TF32 and has no bf16; the autocast of the bf16 row is put around its objective.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.job import DEAD_TOKENS, SHRUNK, Job, Unsuitable, autocast, n_dead, use_tensor_cores


class Saev:
    """An SAE, its objective and its optimiser."""

    def __init__(self, sae: Any, objective: Any, job: Job) -> None:
        self.versions = {"torch": str(torch.__version__)}
        self.settings = "its train()'s calls" + (" under autocast" if job.precision == "bf16" else "")
        self._sae, self._objective, self._job = sae, objective, job
        self._optimizer = torch.optim.Adam(sae.parameters(), lr=job.lr, fused=True)

    def step(self, x: Tensor) -> object:
        sae = self._sae
        sae.normalize_w_dec()
        with autocast(self._job):
            loss, _ = self._objective(sae, x)
        loss.loss.backward()
        sae.remove_parallel_grads()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), max_norm=1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = self._sae.encode(x).f_x
        return codes, self._sae.decode(codes)[:, -1, :]

    def n_dead(self) -> int:
        return int((self._objective.toks_since_active >= DEAD_TOKENS).sum())


def build(job: Job, x: Tensor) -> Saev:
    if job.arch not in ("topk", "batchtopk", "matryoshka"):
        raise Unsuitable(f"saev has no {job.arch}")
    os.environ["JAXTYPING_DISABLE"] = "1"
    sys.path.insert(0, str(Path(job.source) / "src"))
    from saev.nn import SparseAutoencoder, SparseAutoencoderConfig, get_objective  # pyright: ignore
    from saev.nn.modeling import AuxK, BatchTopK, TopK  # pyright: ignore[reportMissingImports]
    from saev.nn.objectives import Matryoshka  # pyright: ignore[reportMissingImports]

    use_tensor_cores(job)
    torch.manual_seed(0)
    activation = (TopK if job.arch == "topk" else BatchTopK)(top_k=job.k, aux=AuxK(k_aux=job.d_model // 2))
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_model=job.d_model, d_sae=job.d_sae, activation=activation))
    objective = get_objective(Matryoshka(n_prefixes=5 if job.arch == "matryoshka" else 1))
    sae, objective = sae.to(job.device).train(), objective.to(job.device).train()
    objective.toks_since_active = torch.zeros(job.d_sae, dtype=torch.int64, device=job.device)
    if dead := n_dead(job):
        with torch.no_grad():
            sae.W_enc[:, -dead:] *= SHRUNK
        objective.toks_since_active[-dead:] = 2 * DEAD_TOKENS
    return Saev(sae, objective, job)
