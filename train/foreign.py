"""SAEs of any tool whose folders we know: which one a folder is of, and what is in it."""

import math
from pathlib import Path
from types import ModuleType

import torch

from cache_spec.errors import UserError
from train.names import available, find
from train.run_folder import FACTS, load_run
from train.stored import Stored, is_unit, refuse_links_in


def format_of(folder: Path) -> ModuleType:
    """The module in formats/ for a folder, known by its weights. Raises UserError that starts with what is wrong."""
    if folder.is_dir():
        refuse_links_in(folder)
    formats = [find("formats", name) for name in available("formats")]
    weights = " or ".join(module.FILES[-1] for module in sorted(formats, key=lambda module: module.FILES[-1]))
    there = [module for module in formats if (folder / module.FILES[-1]).is_file()]
    if len(there) == 1:
        return there[0]
    if there:
        both = " and ".join(module.FILES[-1] for module in there)
        raise UserError(f"it has {both}, of several tools; give each a folder of its own")
    if not folder.exists():
        raise UserError("there is no such folder; give the folder of one SAE")
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    below = [name for name in inside if any((folder / name / module.FILES[-1]).is_file() for module in formats)]
    hint = f"name one of the folders in it: {', '.join(below[:5])}" if below else "give the folder of one SAE"
    raise UserError(f"it has no {weights}; {hint}")


def read_folder(folder: Path) -> Stored:
    """The SAE in a folder: a finished run, or one that SAELens, dictionary_learning or sparsify wrote.

    Raises UserError for anything else.
    """
    l0 = None
    if (folder / FACTS).exists():
        held_out = load_run(folder).facts.get("held_out")  # says so if the run is not whole
        l0 = held_out.get("l0") if isinstance(held_out, dict) else None
        l0 = l0 if isinstance(l0, int | float) and 0 < l0 < math.inf else None
    try:
        stored: Stored = format_of(folder).read(folder)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return Stored(sae=stored.sae, metadata=stored.metadata, l0=l0, notes=(*stored.notes, *_notes(stored)))


@torch.no_grad()
def _notes(stored: Stored) -> list[str]:
    off = int((~is_unit(stored.sae.W_dec)).sum())
    if not off:
        return []
    return [f"{off} of {stored.sae.d_sae} decoder rows do not have length 1, which SAEBench wants"]
