"""Which kernel trains which run of a sweep, said once."""

import logging
from collections import Counter
from collections.abc import Sequence

from train.config import RunConfig
from train.engine import Job, Kernel
from train.kernels._select import select
from train.loader import MixedBatchLoader
from train.step import recipe_of

_log = logging.getLogger(__name__)


def kernels_for(loader: MixedBatchLoader, configs: Sequence[RunConfig], name: str) -> list[Kernel]:
    """The kernel of each run. Raises UserError for a name that is unknown, or that cannot train one of them."""
    kernels = [kernel_of(config, loader, name) for config in configs]
    choices = Counter((kernel.name, kernel.why) for kernel in kernels)
    for (chosen, why), n in choices.items():
        whose = f" for {n} of {len(configs)} SAEs" if len(choices) > 1 else ""
        _log.info("kernel: %s%s (%s)", chosen, whose, f"auto: {why}" if why else "as asked for")
    return kernels


def kernel_of(config: RunConfig, loader: MixedBatchLoader, name: str) -> Kernel:
    """The kernel of one run, said to nobody."""
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
