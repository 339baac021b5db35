"""Train sparse autoencoders from a cache. No model, no tokenizer, no network.

The names below are imported when they are first used: torch takes seconds, and `python -m train --help` should not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config import DataConfig, RunConfig
    from train.loader import MixedBatchLoader
    from train.mixing import Batch
    from train.recipe import Recipe
    from train.run_folder import TrainedRun, load_run
    from train.sae import SparseAutoencoder
    from train.sweep import train_sweep

__all__ = [
    "Batch",
    "DataConfig",
    "MixedBatchLoader",
    "Recipe",
    "RunConfig",
    "SparseAutoencoder",
    "TrainedRun",
    "load_run",
    "train_sweep",
]
_HOMES = {
    "Batch": "mixing",
    "DataConfig": "config",
    "MixedBatchLoader": "loader",
    "Recipe": "recipe",
    "RunConfig": "config",
    "SparseAutoencoder": "sae",
    "TrainedRun": "run_folder",
    "load_run": "run_folder",
    "train_sweep": "sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no name '{name}'")
    return getattr(importlib.import_module(f"train.{_HOMES[name]}"), name)
