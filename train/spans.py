"""The named parts of a training step, as spans in a profiler's trace; `--profile` (train/profile.py) adds them up."""

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

PREFIX = "granary: "  # of every span's name in a trace

# on the thread of an SAE's step
ENCODE, SELECT, DECODE = "encoder product", "selection", "decode and loss"
GRADIENTS, DEAD, WEIGHT_GRADIENTS, UPDATE = "gradients", "auxk on dead latents", "weight gradients", "update"
LOG = "log and checkpoint"
SAE_STEP = "other in SAE steps"  # around all of these
# on the thread that hands out the rows
MIX, WAIT = "mix rows", "wait for rows"
STEP = "other between SAE steps"  # around everything that belongs to a step
# on the threads that read ahead
READ = "read rows"

PARTS = (WAIT, MIX, ENCODE, SELECT, DECODE, GRADIENTS, DEAD, WEIGHT_GRADIENTS, UPDATE, LOG, SAE_STEP, STEP)
"""Where a step's time can go, in the order of the table."""

_NOTHING = nullcontext()


def span(part: str) -> AbstractContextManager[object]:
    """A part of a step as a context; nothing while no profiler runs, for torch's own costs microseconds even then."""
    return profiler.record_function(PREFIX + part) if profiler._is_profiler_enabled else _NOTHING
