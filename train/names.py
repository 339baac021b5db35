"""A file name is a name: train/architectures/foo.py defines `foo`, and `--arch foo` finds it."""

import importlib
import math
from pathlib import Path
from types import ModuleType

from cache_spec.errors import UserError

_KINDS = {
    "architectures": "architecture",
    "penalties": "penalty",
    "corruptions": "corruption",
    "kernels": "kernel",
    "presets": "preset",
    "formats": "format",
}


def available(folder: str) -> list[str]:
    """The names that exist in one folder of this room."""
    return sorted(path.stem for path in (Path(__file__).parent / folder).glob("[!_]*.py"))


def find(folder: str, name: str) -> ModuleType:
    """The module of a name; raises UserError with the names that exist."""
    if name not in available(folder):
        raise UserError(f"there is no {_KINDS[folder]} '{name}'; there are {', '.join(available(folder))}")
    return importlib.import_module(f"train.{folder}.{name}")


def short_number(value: float) -> str:
    """The shortest text that gives the same number: 0.001, 20, 1.0000001e-03 as repr has it."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def parse_setting(text: str, what: str) -> tuple[str, float]:
    """Read `name=number`. Raises UserError for anything else, NaN and infinity among it."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"'{text}' is not a {what}; write a name and a number, such as {name or 'name'}=0.1")
    return name.strip(), value
