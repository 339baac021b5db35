"""Train sparse autoencoders from a cache. No model, no tokenizer, no network."""

from train.config import DataConfig, RunConfig
from train.loader import Batch, MixedBatchLoader
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
