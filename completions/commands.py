"""Every command of granary, found from the apps themselves, and the values that some of their options take."""

from importlib import import_module
from typing import Any

from typer.core import TyperGroup
from typer.main import get_command

import evaluate.names
import evaluate.saebench.run_saebench
import train.names
from harvest.hub_name import PRESETS
from harvest.locate import SHORT_NAMES
from harvest.options import MASK_KINDS
from train.config import POSITIONS, PRECISIONS, TARGETS
from train.ranks import PARALLEL
from train.readers import IO

ROOMS = ("harvest", "train", "evaluate", "cache_spec")
_KERNELS = ["auto", *train.names.available("kernels")]
_LATENTS = ["all", "top", "dead", "random"]
VALUES: dict[str, list[str]] = {  # a name that ends in = wants a number behind it
    "harvest --model": [*SHORT_NAMES],
    "harvest --dataset": [*PRESETS, "embedded"],
    "harvest --mask-unit": [*MASK_KINDS],
    "harvest --dtype": ["auto", "float32", "bfloat16", "float16"],
    "harvest --attention": ["auto", "sdpa", "eager", "flash_attention_2"],
    "train --arch": train.names.available("architectures"),
    "train --penalty": [f"{name}=" for name in train.names.available("penalties")],
    "train --corrupt": ["none", *train.names.available("corruptions")],
    "train --preset": train.names.available("presets"),
    "train --kernel": _KERNELS,
    "train --positions": [*POSITIONS],
    "train --target": [*TARGETS],
    "train --precision": [*PRECISIONS],
    "train --io": [*IO],
    "train --parallel": [*PARALLEL],
    "train --track": ["wandb", "trackio", "tensorboard"],
    "train --decoder": ["unit", "free"],
    "train --init-b-dec": ["zero", "median", "mean"],
    "train --masked-schedule": ["constant", "linear="],
    "train export --to": train.names.available("formats"),
    "evaluate --metrics": evaluate.names.available(),
    "evaluate features --latents": _LATENTS,
    "evaluate neuronpedia --latents": _LATENTS,
    "evaluate saebench --evals": [*evaluate.saebench.run_saebench.NAMES],
}
_DEVICES = ["cpu", "cuda", "mps"]


def commands() -> dict[str, Any]:
    """What is typed after `python -m`, such as "train" or "cache_spec info", and the typer command that it means."""
    found: dict[str, Any] = {}
    for room in ROOMS:
        module = import_module(f"{room}.__main__")
        main = get_command(module.app)
        if isinstance(main, TyperGroup):
            found |= {f"{room} {name}": command for name, command in main.commands.items()}
        else:
            found[room] = main
        for name, other in vars(module).get("OTHERS", {}).items():
            found[f"{room} {name}"] = get_command(import_module(other).app)
    return found


def options(command: Any) -> list[str]:
    """The options of a command as they are typed, --no-... among them, sorted."""
    names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    return sorted({"--help", *(name for name in names if name.startswith("--"))})


def values(name: str, command: Any) -> dict[str, list[str]]:
    """option -> what it takes, for the options of a command whose values are known names."""
    known = {option: found for key, found in VALUES.items() for room, option in [key.rsplit(" ", 1)] if room == name}
    return known | ({"--device": _DEVICES} if "--device" in options(command) else {})
