"""dictionary_learning, from a checkout: a trainer's `update`, as its trainSAE calls it, without logging.

Its bf16 is trainSAE's autocast_dtype=torch.bfloat16: rows cast to bf16, autocast around the update. On a CPU trainSAE
drops the autocast without a word; here it stays. Its package imports nnsight, for reading a model and not for the step;
an empty module stands for that.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.job import (
    DEAD_TOKENS,
    SHRUNK,
    Job,
    Unsuitable,
    autocast,
    first_step,
    n_dead,
    n_steps,
    shares_of_prefixes,
    threshold_for,
    use_tensor_cores,
)

TRAINERS = {
    "topk": ("top_k", "TopKTrainer"),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("jumprelu", "JumpReluTrainer"),
}
PACKAGE = "dictionary_learning"


class DictionaryLearning:
    """A trainer and the number of its step."""

    def __init__(self, trainer: Any, job: Job) -> None:
        self.versions = {"torch": str(torch.__version__)}
        self.settings = "trainer.update" + (" under autocast, rows in bf16" if job.precision == "bf16" else "")
        self._trainer, self._job, self._n_done = trainer, job, first_step(job)
        self._dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32

    def step(self, x: Tensor) -> object:
        self._n_done += 1
        with autocast(self._job):
            return self._trainer.update(self._n_done, x.to(self._dtype))

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = self._trainer.ae
        codes = sae.encode(x) if self._job.arch == "jumprelu" else sae.encode(x, use_threshold=False)
        return codes, sae.decode(codes)

    def n_dead(self) -> int:
        return int((self._trainer.num_tokens_since_fired >= DEAD_TOKENS).sum())


def build(job: Job, x: Tensor) -> DictionaryLearning:
    use_tensor_cores(job)
    trainer = new_trainer(job)
    sae = trainer.ae
    with torch.no_grad():
        if job.arch == "jumprelu":
            sae.threshold.fill_(threshold_for(x @ sae.W_enc + sae.b_enc, job.k))
        else:
            sae.b_dec.copy_(importlib.import_module(f"{PACKAGE}.trainers.top_k").geometric_median(x))
        if dead := n_dead(job):
            (sae.W_enc.t() if job.arch == "matryoshka" else sae.encoder.weight)[-dead:] *= SHRUNK
            trainer.num_tokens_since_fired[-dead:] = 2 * DEAD_TOKENS
    return DictionaryLearning(trainer, job)


def new_trainer(job: Job) -> Any:
    """Its trainer for the architecture, with its own defaults for all but sizes and rates."""
    if job.arch not in TRAINERS:
        raise Unsuitable(f"dictionary_learning has no {job.arch} of this kind")
    sys.path.insert(0, job.source)
    nnsight: Any = ModuleType("nnsight")
    nnsight.LanguageModel = object
    sys.modules.setdefault("nnsight", nnsight)
    file, name = TRAINERS[job.arch]
    torch.manual_seed(0)
    more: dict[str, Any] = {"target_l0": job.k, "sparsity_warmup_steps": 0} if job.arch == "jumprelu" else {"k": job.k}
    if job.arch == "matryoshka":
        more["group_fractions"] = shares_of_prefixes()
    return getattr(importlib.import_module(f"{PACKAGE}.trainers.{file}"), name)(
        steps=n_steps(job),
        activation_dim=job.d_model,
        dict_size=job.d_sae,
        layer=0,
        lm_name="made-up",
        lr=job.lr,
        warmup_steps=0,
        device=job.device,
        **more,
    )
