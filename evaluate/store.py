"""Store: activations of evaluation text on disk, so that a model runs over it once, however many SAEs are measured."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.files import write_file


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
            try:
                return load(path.read_bytes())
            except SafetensorError as error:
                raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from error
        tensors = _on_cpu(make())
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(path, save(tensors, {"facts": text}))
        return tensors


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
