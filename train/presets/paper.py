"""The set-up of the masked-regularisation paper (arXiv 2604.06495), which is dictionary_learning's.

What is not here (clipping, AuxK's 1/32, initial weights, the decoder's unit length, the fall of the learning rate
over the last fifth of the steps) is what our architectures do anyway.
"""

from typing import Any


def paper() -> dict[str, Any]:
    """Options by name. 500M tokens make 244,140 steps of 2048."""
    return {
        "tokens": "500M",
        "batch_size": 2048,
        "lr": ["3e-4"],
        "seed": ["0"],
        "warmup_steps": 1000,
        "sparsity_warmup_steps": 5000,
        "anneal_start": 10_000,
        "threshold_start": 1000,
        "threshold_beta": 0.999,
        "dead_tokens": 10_000_000,
    }
