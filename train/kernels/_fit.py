"""Which runs can be trained on the few codes that are on, by any kernel that works so."""

from train.activations import BatchTopK, JumpReLU, TopK
from train.engine import Job
from train.step import penalties_of

_PENALTIES = {"auxk", "l0"}  # those that look at few codes


def needs_whole_codes(job: Job) -> str:
    """Why a run needs codes [batch, d_sae] written out; empty if it does not."""
    config, recipe = job.config, job.recipe
    if not isinstance(recipe.activation, TopK | BatchTopK | JumpReLU) or recipe.gated:
        return f"the codes of {config.arch} are not few"
    if config.consistency:
        return "--consistency compares whole codes"
    if config.resample_every:
        return "--resample-every looks at whole codes"
    for name, coefficient in penalties_of(config, recipe).items():
        if coefficient and name not in _PENALTIES:
            return f"the penalty {name} looks at whole codes"
    return ""
