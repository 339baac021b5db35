"""Evaluation finds the cache of a run at a URL, where its run.json says or where one says."""

import numpy as np
import pytest
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import CacheError, CacheNotFound
from cache_spec.copies import Copies
from cache_spec.remote import open_cache as open_anywhere
from evaluate.runs import find_runs, open_cache, open_caches
from train.loader import MixedBatchLoader
from train.sweep import train_sweep


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    local = make_training_cache(folder / "cache.zarr", n_train=192, n_held_out=128)
    copies = Copies(folder=folder / "copies", n_bytes=10**6)
    remote = open_anywhere(f"file://{local.path}", copies)
    train_sweep(MixedBatchLoader(remote, DATA), [run_config()], out=folder / "runs")
    return local, copies, find_runs(folder / "runs")[0]


def test_a_run_s_cache_is_opened_where_it_was_trained_from(made):
    local, copies, runs = made
    assert runs[0].cache_path == f"file://{local.path}"
    left_out: dict[str, str] = {}
    found = open_caches(runs, None, left_out, copies)[runs[0].cache_id]
    assert not left_out
    assert found.place == f"file://{local.path}"
    for shard in local.held_out_shards:
        assert np.array_equal(
            found.activations("layer_1", "masked", shard), local.activations("layer_1", "masked", shard)
        )


def test_a_given_place_wins_be_it_a_folder_or_a_url(made, tmp_path):
    local, copies, runs = made
    assert open_cache(runs[0], local.path).place == str(local.path)
    assert open_cache(runs[0], f"file://{local.path}", copies).place == f"file://{local.path}"
    with pytest.raises(CacheNotFound, match=r"there is nothing at file:.*nowhere"):
        open_cache(runs[0], f"file://{tmp_path}/nowhere", copies)
    other = make_training_cache(tmp_path / "other.zarr", seed=5)
    with pytest.raises(CacheError, match=rf"file://{other.path} is cache .*, and run batchtopk was trained on"):
        open_cache(runs[0], f"file://{other.path}", copies)
