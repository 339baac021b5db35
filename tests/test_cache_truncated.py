"""A file that was cut short is refused when the cache is opened, whichever file it is."""

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from cache_fixtures import make_cache, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import ActivationCache, CacheError, transcode


def with_planner_files(path: Path) -> Path:
    """A complete cache that has every kind of file."""
    sums = {}
    (path / "_granary").mkdir(parents=True)
    for name in ("windows", "window_docs"):
        data = io.BytesIO()
        np.save(data, np.arange(60, dtype=np.uint32).reshape(6, 10))
        (path / f"_granary/{name}.npy").write_bytes(data.getvalue())
        sums[f"{name}_sha256"] = hashlib.sha256(data.getvalue()).hexdigest()
    return make_cache(path, dataclasses.replace(make_plan(), source={"id": "text", **sums}))


@pytest.fixture(scope="module", params=["cache", "archive"])
def path(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("truncated")
    with_planner_files(folder / "cache")
    if request.param == "archive":
        transcode(folder / "cache", folder / "archive")
    return folder / request.param


def kinds(path: Path) -> list[str]:
    """Every file but the empty lock."""
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f.name != "lock")


@given(data=st.data())
@settings(max_examples=120)
def test_a_file_cut_to_any_length_is_refused_by_name(path, data):
    name = data.draw(st.sampled_from(kinds(path)))
    whole = (path / name).read_bytes()
    n_left = data.draw(st.one_of(st.just(len(whole) - 1), st.integers(0, len(whole) - 1)))
    (path / name).write_bytes(whole[:n_left])
    try:
        with pytest.raises(CacheError) as caught:
            ActivationCache.open(path)
        assert Path(name).name in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        (path / name).write_bytes(whole)
    assert ActivationCache.open(path).status == "complete"


@given(data=st.data())
def test_a_missing_file_is_refused(path, data):
    name = data.draw(st.sampled_from(kinds(path)))
    (path / name).rename(path / "away")
    try:
        with pytest.raises(CacheError):
            ActivationCache.open(path)
    finally:
        (path / "away").rename(path / name)


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # numpy tries twice to make sense of a header
def test_a_changed_header_of_the_planners_array_gives_no_traceback(path):
    file = path / "_granary/windows.npy"
    whole = file.read_bytes()
    try:
        for place in range(128):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
            try:
                ActivationCache.open(path)  # what it does not notice, `verify` does by the SHA-256
            except CacheError as error:
                refusal = str(error)
            else:
                refusal = file.name
            assert file.name in refusal
    finally:
        file.write_bytes(whole)
