"""Store: activations of evaluation text on disk, so that a model runs over it once, however many SAEs are measured."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.files import remove_stale_partials_of, write_file


class Store:
    """A folder of safetensors files, one for each name and set of facts; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, name: str, facts: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `make` gives, from disk if they were made from the same facts before; on the CPU.

        `facts` are all that decides the tensors (model revision, hook point, a hash of the text, seed), as JSON.
        Raises UserError if the file is damaged.
        """
        if self._folder is None:
            return _on_cpu(make())
        text = json.dumps(facts, sort_keys=True)
        path = self._folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        if path.is_file():
            return _read(path)
        tensors = _on_cpu(make())
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_stale_partials_of(path)
        write_file(path, save(tensors, {"facts": text, "crc32c": _sum(tensors)}))
        return tensors


def _read(path: Path) -> dict[str, Tensor]:
    data = path.read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header.get("__metadata__", {}).get("crc32c") != _sum(tensors):
        raise UserError(f"{path} is damaged (it does not match its own checksum); delete it, and it is made again")
    return tensors


def _sum(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of their names and bytes."""
    total = 0
    for name in sorted(tensors):
        total = google_crc32c.extend(total, name.encode())
        total = google_crc32c.extend(total, tensors[name].reshape(-1).view(torch.uint8).numpy())
    return f"{total:08x}"


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
