"""SAELens, from an environment: SAETrainer.step without logging. Its bf16 is its option autocast.

Variants: "" as its runner trains; "sparse" with use_sparse_activations, which fails in the backward pass on a CPU
unless rescale_acts_by_decoder_norm is off, so there it is; "compiled" with what its compile_sae does.
"""

import importlib.metadata
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.job import (
    SHRUNK,
    Job,
    Unsuitable,
    n_dead,
    n_steps,
    shares_of_prefixes,
    threshold_for,
    use_tensor_cores,
)


class SAELens:
    """A trainer around one of its SAEs."""

    def __init__(self, trainer: Any, job: Job) -> None:
        self.versions = {"torch": str(torch.__version__), "sae-lens": importlib.metadata.version("sae-lens")}
        words = ["SAETrainer.step", "autocast" if job.precision == "bf16" else ""]
        words.append({"sparse": "use_sparse_activations", "compiled": "compile_sae"}.get(job.variant, ""))
        words.append("rescale_acts_by_decoder_norm off" if job.variant == "sparse" else "")
        self.settings = ", ".join(filter(None, words))
        self._trainer = trainer

    def step(self, x: Tensor) -> object:
        output = self._trainer.step(x)
        self._trainer.n_training_steps += 1
        return output

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = self._trainer.sae
        codes = sae.encode_with_hidden_pre(x)[0]
        return codes.to_dense(), sae.decode(codes)

    def n_dead(self) -> int:
        return int(self._trainer.dead_neurons.sum())


def build(job: Job, x: Tensor) -> SAELens:
    if job.variant == "sparse" and job.arch != "topk":
        raise Unsuitable("SAELens has use_sparse_activations for topk only")
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    use_tensor_cores(job)
    torch.manual_seed(0)
    sae = new_sae(job)
    config = SAETrainerConfig(
        total_training_samples=n_steps(job) * job.batch,
        train_batch_size_samples=job.batch,
        lr=job.lr,
        lr_end=job.lr,
        adam_beta1=0.0 if job.arch == "jumprelu" else 0.9,
        device=job.device,
        autocast=job.precision == "bf16",
    )
    trainer = SAETrainer(config, sae, iter(()))
    with torch.no_grad():
        if job.arch == "jumprelu":
            sae.threshold.fill_(threshold_for(sae.encode_with_hidden_pre(x)[1], job.k))
        if dead := n_dead(job):
            sae.W_enc[:, -dead:] *= SHRUNK
            trainer.n_forward_passes_since_fired[-dead:] = 2 * config.dead_feature_window
    if job.variant == "compiled":
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    return SAELens(trainer, job)


def new_sae(job: Job) -> Any:
    """Its SAE for the architecture, with its own defaults where they are no matter of size or of the target."""
    from sae_lens.saes import batchtopk_sae as batchtopk  # pyright: ignore[reportMissingImports]
    from sae_lens.saes import jumprelu_sae as jumprelu  # pyright: ignore[reportMissingImports]
    from sae_lens.saes import matryoshka_batchtopk_sae as matryoshka  # pyright: ignore[reportMissingImports]
    from sae_lens.saes import topk_sae as topk  # pyright: ignore[reportMissingImports]

    sizes: dict[str, Any] = {"d_in": job.d_model, "d_sae": job.d_sae, "device": job.device}
    if job.arch == "topk":
        sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        more = sparse if job.variant == "sparse" else {}
        return topk.TopKTrainingSAE(topk.TopKTrainingSAEConfig(**sizes, k=job.k, **more))
    if job.arch == "batchtopk":
        return batchtopk.BatchTopKTrainingSAE(batchtopk.BatchTopKTrainingSAEConfig(**sizes, k=job.k))
    if job.arch == "matryoshka":
        widths = [round(share * job.d_sae) for share in accumulate(shares_of_prefixes())]
        config = matryoshka.MatryoshkaBatchTopKTrainingSAEConfig(**sizes, k=job.k, matryoshka_widths=widths)
        return matryoshka.MatryoshkaBatchTopKTrainingSAE(config)
    if job.arch == "jumprelu":
        target = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": job.k, "l0_coefficient": 1 / (2 * job.k)}
        config = jumprelu.JumpReLUTrainingSAEConfig(**sizes, **target, jumprelu_bandwidth=0.001, decoder_init_norm=1.0)
        return jumprelu.JumpReLUTrainingSAE(config)
    raise Unsuitable(f"SAELens has no {job.arch} of this kind")
