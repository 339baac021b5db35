"""The other half of compat: runs inside .venv-compat, where the tools are, and imports nothing of ours.

    python compat_reader.py TOOL JOBS [CHECKOUT]

JOBS is a JSON list of [folder, rows file, file to write]; each answer is written as it comes. CHECKOUT stands in for
the package of dictionary_learning.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Computed = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows -> codes, and what is made of them
# What dictionary_learning imports for running models, and loading an SAE does not need; an empty module stands for it
NEEDS = {
    "datasets": ["load_dataset"],
    "transformers": ["AutoModelForCausalLM", "AutoTokenizer"],
    "nnsight": ["LanguageModel"],
    "zstandard": ["ZstdDecompressor"],
}


def saelens(folder: str) -> Computed:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = SAE.load_from_disk(folder, device="cpu")
    return lambda x: (sae.encode(x), sae(x))


def sparsify(folder: str) -> Computed:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would want a GPU where Triton is installed
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

    sae = SparseCoder.load_from_disk(folder)

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        top = sae.encode(x)
        codes = torch.zeros(len(x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
        return codes, sae(x).sae_out

    return compute


def dictionary_learning(folder: str) -> Computed:
    for name, attributes in NEEDS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(dict.fromkeys(attributes, object))
    utils = importlib.import_module("dictionary_learning.utils")
    sae, _ = utils.load_dictionary(folder, device="cpu")
    return lambda x: (sae.encode(x), sae.decode(sae.encode(x)))


TOOLS = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}


@torch.no_grad()
def main(tool: str, jobs: str, checkout: str = "") -> None:
    """Load every folder with the tool, and write the codes of the rows and what the tool makes of them."""
    if checkout:
        sys.path.insert(0, checkout)
    torch.set_num_threads(1)
    for folder, rows, out in json.loads(jobs):
        codes, made = TOOLS[tool](folder)(load_file(rows)["x"])
        save_file({"codes": codes.contiguous(), "made": made.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
