"""What training one SAE on many processes cannot do, said before anything is written, and what it needs."""

from collections.abc import Sequence

import torch

from cache_spec.errors import UserError
from train.config import RunConfig
from train.loader import MixedBatchLoader
from train.parallel.axis import Spread

_ANY = 2**62  # bytes, where nobody set a limit


def refuse_spread(configs: Sequence[RunConfig], loader: MixedBatchLoader, spread: Spread) -> None:
    """Raises UserError for rows or latents that do not make equal shares, and for resampling."""
    batch = loader.data.batch_size
    if batch % spread.rows.size:
        raise UserError(
            f"--batch-size {batch} cannot be shared equally by {spread.rows.size} processes; give a multiple of "
            f"{spread.rows.size}, or start another number of them"
        )
    for config in configs:
        if config.d_sae % spread.latents.size:
            raise UserError(
                f"--d-sae {config.d_sae} cannot be shared equally by {spread.latents.size} processes; give a multiple "
                f"of {spread.latents.size}, or start another number of them"
            )
        if config.resample_every and spread.size > 1:
            raise UserError(
                "--resample-every draws rows from the whole batch and rewrites latents, which is not done over "
                "several processes; leave it out, or train with --parallel sweep"
            )


def least_memory(spread: Spread, memory: int | None) -> int | None:
    """The least bytes that any of the processes has to plan with; None: none has a limit."""
    if spread.size == 1:
        return memory
    least = int(spread.all.least(torch.tensor(_ANY if memory is None else memory)))
    return None if least == _ANY else least
