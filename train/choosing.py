"""Which kernel trains which run of a sweep, said once."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cache_spec.errors import UserError
from train.config import RunConfig
from train.engine import Job, Kernel
from train.kernels._select import select
from train.loader import MixedBatchLoader
from train.parallel.axis import ALONE, Spread
from train.step import recipe_of

SPREADS = "dense"
"""The kernel that knows how to train one SAE on several processes."""
_log = logging.getLogger(__name__)


def kernels_for(
    loader: MixedBatchLoader, configs: Sequence[RunConfig], name: str, spread: Spread = ALONE
) -> list[Kernel]:
    """The kernel of each run. Raises UserError for a name that is unknown, or that cannot train one of them."""
    kernels = [kernel_of(config, loader, name, spread) for config in configs]
    choices = Counter((kernel.name, kernel.why) for kernel in kernels)
    for (chosen, why), n in choices.items():
        whose = f" for {n} of {len(configs)} SAEs" if len(choices) > 1 else ""
        _log.info("kernel: %s%s (%s)", chosen, whose, f"auto: {why}" if why else "as asked for")
    return kernels


def kernel_of(config: RunConfig, loader: MixedBatchLoader, name: str, spread: Spread = ALONE) -> Kernel:
    """The kernel of one run, said to nobody. Where it is spread over processes there is one, the dense one."""
    if spread.size > 1:
        if name not in ("auto", SPREADS):
            raise UserError(
                f"--kernel {name} trains an SAE on one process; leave it out, or give --kernel {SPREADS}, which can "
                "be spread over several"
            )
        kernel = select(SPREADS, str(loader.device), job_of(config, loader))
        return replace(kernel, why="the one that can be spread over processes") if name == "auto" else kernel
    return select(name, str(loader.device), job_of(config, loader))


def job_of(config: RunConfig, loader: MixedBatchLoader) -> Job:
    """What the choice of a kernel depends on."""
    return Job(
        recipe=recipe_of(config, transcoder=bool(loader.data.target_hook)),
        config=config,
        d_model=loader.hook.d_model,
        d_out=loader.d_out,
        batch_size=loader.data.batch_size,
    )
