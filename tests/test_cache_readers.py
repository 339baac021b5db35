"""Other readers: Zarr, tensorstore, xarray and plain memory maps see the same rows with no help of ours."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from cache_fixtures import make_cache, make_hook, make_plan

from cache_spec import ActivationCache

READERS = """
import json, sys
import numpy as np, tensorstore, xarray, zarr

path, name = sys.argv[1], sys.argv[2]
there = zarr.open(f"{path}/{name}", mode="r")
rows = there[...]
store = {"driver": "file", "path": f"{path}/{name}"}
other = tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result()
assert other.dtype == rows.dtype and other.tobytes() == rows.tobytes(), "tensorstore"

document = json.load(open(f"{path}/{name}/zarr.json"))
mmap = document["attributes"]["granary"]["mmap"]
n_rows, d_model = document["shape"]
parts = []
for first in range(0, n_rows, mmap["rows_per_file"]):
    shape = (min(mmap["rows_per_file"], n_rows - first), d_model)
    file = f"{path}/{name}/c/{first // mmap['rows_per_file']}/0"
    assert mmap["row_bytes"] == 2 * d_model
    parts.append(np.memmap(file, "<f2", "r", offset=mmap["offset"], shape=shape))
assert np.concatenate(parts).tobytes() == rows.tobytes(), "memmap"

group, _, array = name.partition("/")
opened = xarray.open_zarr(f"{path}/{group}", consolidated=False, zarr_format=3)[array]
assert opened.dims == ("row", "feature")
true = rows.astype(np.float64) * document["attributes"]["scale_factor"]
assert np.array_equal(opened.values.astype(np.float64), true), "xarray"
assert not [module for module in sys.modules if module.startswith("cache_spec")]
np.save(sys.argv[3], rows)
"""


@pytest.mark.parametrize("scale_factor", [1.0, 16.0])
def test_four_readers_agree_without_granary(tmp_path, scale_factor):
    plan = make_plan(n_rows=150)
    plan = dataclasses.replace(plan, hooks=(make_hook(1, 6, scale_factor),))
    path = make_cache(tmp_path / "cache", plan)
    out = tmp_path / "rows.npy"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READERS, str(path), "layer_1/masked", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # where there is no granary to import
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert np.load(out).tobytes() == ActivationCache.open(path).read("1", "masked", np.arange(150)).tobytes()


def test_the_consolidated_metadata_repeats_every_document(tmp_path):
    path = make_cache(tmp_path / "cache", make_plan(layers=(1, 2)))
    root = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    for file in path.rglob("zarr.json"):
        name = file.parent.relative_to(path).as_posix()
        if name != ".":
            kept = {key: value for key, value in root[name].items() if key != "consolidated_metadata"}
            assert kept == json.loads(file.read_text())
