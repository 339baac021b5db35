"""What is written is what every reader reads: mapped memory, our reader, plain Zarr."""

import dataclasses
import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_fixtures import make_cache, make_plan, make_shard, scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from cache_spec import ActivationCache, Plan, cache_bytes, column_types, create_cache, shard_files, write_shard
from cache_spec.layout import activation_array, activation_file, chunks_in, column_file, column_fill

PLANS = st.builds(
    lambda n_rows, chunk_rows, n_chunks, d_model, n_masked, layers: make_plan(
        n_rows=n_rows,
        chunk_rows=chunk_rows,
        shard_rows=chunk_rows * n_chunks,
        d_model=d_model,
        n_masked=n_masked,
        layers=layers,
    ),
    n_rows=st.integers(1, 90),
    chunk_rows=st.integers(1, 13),
    n_chunks=st.integers(1, 5),
    d_model=st.integers(1, 9),
    n_masked=st.integers(0, 3),
    layers=st.sampled_from([(0,), (3, 1)]),
)


@settings(max_examples=25, deadline=None)
@given(plan=PLANS)
def test_every_reader_reads_what_was_written(plan):
    with scratch() as folder:
        path = make_cache(folder / "cache", plan)
        cache = ActivationCache.open(path)
        group = zarr.open_group(path, mode="r")
        given_shards = [make_shard(plan, shard) for shard in range(plan.n_shards)]
        for hook in plan.hooks:
            for variant in plan.variants:
                written = np.concatenate([given[0][hook.name, variant.name] for given in given_shards])
                mapped = np.concatenate([cache.activations(hook.name, variant.name, s) for s in cache.shards])
                array = group[activation_array(hook.name, variant.name)]
                assert isinstance(array, zarr.Array)
                assert mapped.tobytes() == written.tobytes()
                assert np.asarray(array[...]).tobytes() == written.tobytes()
        for name in column_types(plan):
            written = np.concatenate([given[1][name] for given in given_shards])
            assert np.concatenate([cache.column(name, s) for s in cache.shards]).tobytes() == written.tobytes()
            column = group[f"rows/{name}"]
            assert isinstance(column, zarr.Array)
            assert np.asarray(column[...]).tobytes() == written.tobytes()


@settings(max_examples=15, deadline=None)
@given(plan=PLANS, data=st.data())
def test_any_rows_in_any_order(plan, data):
    rows = np.array(data.draw(st.lists(st.integers(0, plan.n_rows - 1), max_size=40)), dtype=np.int64)
    with scratch() as folder:
        cache = ActivationCache.open(make_cache(folder / "cache", plan))
        name, variant = plan.hooks[-1].name, plan.variants[-1].name
        whole = np.concatenate([make_shard(plan, shard)[0][name, variant] for shard in range(plan.n_shards)])
        assert cache.read(name, variant, rows).tobytes() == whole[rows].tobytes()


@settings(max_examples=15, deadline=None)
@given(plan=PLANS, data=st.data())
def test_a_row_lies_where_the_address_says(plan, data):
    row = data.draw(st.integers(0, plan.n_rows - 1))
    shard, inside = divmod(row, plan.shard_rows)
    hook = plan.hooks[0]
    with scratch() as folder:
        path = make_cache(folder / "cache", plan)
        attributes = json.loads((path / activation_array(hook.name, "clean") / "zarr.json").read_bytes())["attributes"]
        mmap = attributes["granary"]["mmap"]
        data_bytes = (path / activation_file(hook.name, "clean", shard)).read_bytes()
        start = mmap["offset"] + inside * mmap["row_bytes"]
        there = np.frombuffer(data_bytes[start : start + mmap["row_bytes"]], "<f2")
        assert there.tobytes() == make_shard(plan, shard)[0][hook.name, "clean"][inside].tobytes()
        assert mmap["rows_per_file"] == plan.shard_rows
        padded_rows = chunks_in(plan, shard) * plan.chunk_rows
        assert len(data_bytes) == mmap["offset"] + padded_rows * mmap["row_bytes"] + mmap["tail_bytes"]


@settings(max_examples=10, deadline=None)
@given(plan=PLANS)
def test_sizes_are_known_before_anything_is_written(plan):
    with scratch() as folder:
        path = make_cache(folder / "cache", plan)
        found = {
            file.relative_to(path).as_posix(): file.stat().st_size for file in path.glob("*/*/c/**/*") if file.is_file()
        }
    wanted: dict[str, int] = {}
    for shard in range(plan.n_shards):
        wanted |= shard_files(plan, shard)
    assert found == wanted
    assert sum(found.values()) == cache_bytes(plan)


@pytest.fixture
def two_layers(tmp_path) -> tuple[Path, Plan]:
    plan = make_plan(layers=(1, 3), n_masked=2)
    return make_cache(tmp_path / "cache", plan), plan


def test_padding_is_nan_and_the_largest_number(two_layers):
    path, plan = two_layers
    n_rows, last = plan.rows_in(2), plan.n_shards - 1
    assert n_rows % plan.chunk_rows, "the last inner chunk is to be partly filled"
    raw = np.fromfile(path / activation_file("layer_1", "clean", last), "<f2", count=2 * plan.chunk_rows * 6)
    assert np.isnan(raw.reshape(-1, 6)[n_rows:]).all()
    raw = np.fromfile(path / column_file("pos", last), "<u2", count=plan.shard_rows)
    assert (raw[n_rows:] == column_fill(np.dtype("<u2"))).all()


def test_a_shard_that_is_not_there_reads_as_nan_never_as_zero(tmp_path):
    plan = make_plan()
    path = make_cache(tmp_path / "cache", plan, shards=range(1), finalize=False)
    array = zarr.open_array(path, path="layer_1/clean", mode="r")
    assert np.isnan(np.asarray(array[plan.shard_rows :])).all()


def test_our_documents_are_those_that_zarr_writes(two_layers, tmp_path):
    path, plan = two_layers
    for hook in plan.hooks:
        zarr.create_array(
            tmp_path / "theirs",
            name=activation_array(hook.name, "clean"),
            shape=(plan.n_rows, hook.d_model),
            shards=(plan.shard_rows, hook.d_model),
            chunks=(plan.chunk_rows, hook.d_model),
            dtype="float16",
            compressors=None,
            filters=None,
            fill_value=float("nan"),
            dimension_names=["row", "feature"],
        )
        ours, theirs = (load(root / hook.name / "clean") for root in (path, tmp_path / "theirs"))
        assert {**ours, "attributes": {}} == theirs
    for name, dtype in column_types(plan).items():
        zarr.create_array(
            tmp_path / "theirs",
            name=f"rows/{name}",
            shape=(plan.n_rows,),
            chunks=(plan.shard_rows,),
            dtype=dtype,
            compressors=[Crc32cCodec()],
            fill_value=column_fill(dtype),
            dimension_names=["row"],
        )
        assert load(path / "rows" / name) == load(tmp_path / "theirs" / "rows" / name)


def test_our_consolidated_metadata_is_what_zarr_would_write(two_layers, tmp_path):
    path, _ = two_layers
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Zarr warns that consolidated metadata is no part of the standard yet
        zarr.consolidate_metadata(copy)
    assert load(copy) == load(path)


def test_zarr_names_the_dimensions_and_lists_no_foreign_folder(two_layers):
    path, plan = two_layers
    group = zarr.open_group(path, mode="r")
    names = {name for name, _ in group.members()}
    assert names == {"layer_1", "layer_3", "rows"}
    array = group["layer_3/masked_1"]
    assert isinstance(array, zarr.Array)
    assert array.metadata.to_dict()["dimension_names"] == ("row", "feature")
    assert group.attrs["granary"]["cache_id"] == plan.cache_id  # type: ignore[index]


def test_the_scale_factor_is_where_xarray_looks_for_it(tmp_path):
    plan = make_plan()
    plan = type(plan)(
        **{**vars(plan), "hooks": (type(plan.hooks[0])(**{**vars(plan.hooks[0]), "scale_factor": 16.0}),)}
    )
    path = make_cache(tmp_path / "cache", plan)
    assert zarr.open_array(path, path="layer_1/clean", mode="r").attrs["scale_factor"] == 16.0
    assert ActivationCache.open(path).hook("layer_1").scale_factor == 16.0


def test_activations_cannot_be_written_through(two_layers):
    rows = ActivationCache.open(two_layers[0]).activations("layer_1", "clean", 0)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0


def load(folder: Path) -> dict:
    return json.loads((folder / "zarr.json").read_bytes())


@pytest.mark.parametrize(("version", "pinned"), [("1.0", "cf34aa5cff5b948c"), ("1.1", "7ef365dd8d109c9c")])
def test_the_bytes_of_version_1_never_change(tmp_path, version, pinned):
    """Pinned: if this fails, caches that exist cannot be read by what is here, so raise the major version."""
    plan = dataclasses.replace(make_plan(n_rows=100), spec_version=version)
    path = tmp_path / "cache"
    create_cache(path, plan)
    for shard in range(plan.n_shards):
        n_rows = plan.rows_in(shard)
        numbers = (np.arange(n_rows * 6).reshape(n_rows, 6) + shard) % 64  # whose squares add up exactly
        activations = {("layer_1", "clean"): numbers.astype("<f2"), ("layer_1", "masked"): (numbers / 8).astype("<f2")}
        columns = {name: np.arange(n_rows).astype(dtype) for name, dtype in column_types(plan).items()}
        write_shard(path, plan, shard, activations, columns)
    assert ActivationCache.open(path, allow_partial=True).plan.has_moments == (version != "1.0")
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != "lock"):
        name = file.relative_to(path).as_posix()
        content = file.read_bytes()
        if name.startswith("_granary/shards/"):  # version 1.0 also said who wrote it and when
            record = json.loads(content)
            fields = ("spec_version", "cache_id", "shard", "rows", "moment_rows", "files")
            content = json.dumps({key: record[key] for key in fields if key in record}).encode()
        if name != "zarr.json":  # which tells of the software
            digest.update(name.encode() + b"\0" + content)
    assert digest.hexdigest()[:16] == pinned
