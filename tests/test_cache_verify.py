"""Verify finds every changed bit, every missing piece, and names what is only left over."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_fixtures import make_cache, make_plan, scratch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_spec import (
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheNotFound,
    Problem,
    create_cache,
    finalize_cache,
    shard_files,
    verify_cache,
)
from cache_spec.files import readable_json
from cache_spec.layout import record_file
from cache_spec.verify import bytes_to_check, raise_if_not_whole

WINDOWS = np.arange(600, dtype="<u4").reshape(-1, 10)


def make_whole_cache(path: Path) -> Path:
    """A complete cache with a planner's file."""
    (path / "_granary").mkdir(parents=True)
    np.save(path / "_granary/windows.npy", WINDOWS)
    checksum = hashlib.sha256((path / "_granary/windows.npy").read_bytes()).hexdigest()
    plan = make_plan(layers=(1, 3), n_masked=2)
    return make_cache(path, replace(plan, source={**plan.source, "windows_sha256": checksum}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_whole_cache(tmp_path_factory.mktemp("verify") / "cache")


@pytest.fixture
def path(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "cache")


def kinds(problems: list[Problem]) -> dict[str, str]:
    return {problem.file: problem.kind for problem in problems}


def test_a_whole_cache_has_no_problems_and_every_byte_is_counted(whole):
    n_checked = []
    assert verify_cache(whole, advance=n_checked.append) == []
    assert sum(n_checked) == bytes_to_check(whole)
    raise_if_not_whole(whole, [])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_bit_anywhere_is_found(whole, data):
    files = sorted(file.relative_to(whole).as_posix() for file in whole.rglob("*") if file.is_file())
    name = data.draw(st.sampled_from([file for file in files if (whole / file).stat().st_size]))
    content = bytearray((whole / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    original = bytes(content)
    content[bit // 8] ^= 1 << bit % 8
    try:
        (whole / name).write_bytes(content)
        try:
            found = [problem.file for problem in verify_cache(whole) if problem.kind == "damaged"]
        except CacheError as error:  # the plan itself, or a version that is no longer ours
            found = [name] if name in str(error) else []
        assert name in found
    finally:
        (whole / name).write_bytes(original)


@pytest.mark.parametrize("other", [b"\t", b"\r", b"  "])
def test_a_document_with_other_white_space_is_found_though_it_says_the_same(whole, other):
    for file in [*whole.rglob("*.json")]:
        original = file.read_bytes()
        place = original.index(b"\n ") + 1
        try:
            file.write_bytes(original[:place] + other + original[place + 1 :])
            assert kinds(verify_cache(whole))[file.relative_to(whole).as_posix()] == "damaged"
        finally:
            file.write_bytes(original)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_or_grown_file_is_found(whole, data):
    name = data.draw(st.sampled_from(sorted(shard_files(make_plan(layers=(1, 3), n_masked=2), 1))))
    original = (whole / name).read_bytes()
    cut = data.draw(st.integers(0, len(original) - 1) | st.just(len(original) + 3))
    try:
        (whole / name).write_bytes((original + b"\0\0\0")[:cut])
        assert kinds(verify_cache(whole)) == {name: "damaged"}
    finally:
        (whole / name).write_bytes(original)


@pytest.mark.parametrize(
    "name",
    [
        "layer_1/masked/c/1/0",
        "rows/pos/c/2",
        "layer_1/zarr.json",
        "layer_3/clean/zarr.json",
        "rows/zarr.json",
        "zarr.json",
        "_granary/manifest.json",
        "_granary/windows.npy",
    ],
)
def test_a_missing_file_is_found(path, name):
    (path / name).unlink()
    assert kinds(verify_cache(path)) == {name: "damaged"}


def test_a_missing_record_of_a_complete_cache_is_damage(path):
    (path / record_file(1)).unlink()
    found = kinds(verify_cache(path))
    assert found["_granary/shards"] == "damaged"
    assert found["layer_1/clean/c/1/0"] == "leftover"


def test_a_shard_swapped_for_another_of_the_same_size_is_found(path):
    shutil.copyfile(path / "layer_1/clean/c/0/0", path / "layer_1/clean/c/1/0")
    assert kinds(verify_cache(path)) == {"layer_1/clean/c/1/0": "damaged"}


def test_the_damaged_rows_are_named(path):
    file = path / "layer_3/masked_1/c/1/0"
    content = bytearray(file.read_bytes())
    content[20 * 12] ^= 16  # row 20 of the shard, in its second inner chunk
    file.write_bytes(content)
    (problem,) = verify_cache(path)
    assert "rows 80 to 95" in problem.what


def test_json_spelled_otherwise_is_noticed(path):
    for name in ("_granary/plan.json", record_file(0), "_granary/manifest.json"):
        original = (path / name).read_bytes()
        (path / name).write_bytes(original + b"\n")
        assert kinds(verify_cache(path)) == {name: "damaged"}
        (path / name).write_bytes(original)


def test_an_unfinished_cache_is_sound_as_far_as_it_goes(tmp_path):
    plan = make_plan()
    path = make_cache(tmp_path / "cache", plan, shards=range(2), finalize=False)
    problems = verify_cache(path)
    assert kinds(problems) == {"_granary/shards": "unfinished"}
    with pytest.raises(CacheIncomplete, match="1 of 3"):
        raise_if_not_whole(path, problems)
    finalize_cache(path, partial=True)
    assert kinds(verify_cache(path)) == {"_granary/shards": "unfinished"}
    make_cache(path, plan, finalize=False)  # gains a shard after it was closed early
    assert not [p for p in verify_cache(path) if p.kind == "damaged"]
    finalize_cache(path)
    assert verify_cache(path) == []


def test_a_cache_that_was_not_closed_is_unfinished(tmp_path):
    problems = verify_cache(make_cache(tmp_path / "cache", make_plan(), finalize=False))
    assert kinds(problems) == {"zarr.json": "unfinished"}


def test_leftovers_are_named_and_do_no_harm(path):
    for name in ("layer_1/clean/c/0/.0.abc.partial", "layer_1/clean/c/9/0", "notes.txt"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"x")
    problems = verify_cache(path)
    assert set(kinds(problems).values()) == {"leftover"}
    assert len(problems) == 3
    raise_if_not_whole(path, problems)


def test_a_record_beyond_the_plan_is_damage(path):
    shutil.copyfile(path / record_file(0), path / record_file(5))
    assert kinds(verify_cache(path))[record_file(5)] == "damaged"


def test_without_a_plan_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(CacheNotFound):
        verify_cache(tmp_path)
    create_cache(tmp_path / "cache", make_plan())
    (tmp_path / "cache/_granary/plan.json").write_bytes(readable_json({}))
    with pytest.raises(CacheDamaged):
        verify_cache(tmp_path / "cache")


def test_many_damaged_files_are_counted(path):
    problems = [Problem(f"file_{i}", "is missing") for i in range(9)]
    with pytest.raises(CacheDamaged, match=r"file_4 and 4 more; to make"):
        raise_if_not_whole(path, problems)


def test_verifying_changes_nothing(whole):
    before = {file: os.stat(file).st_mtime_ns for file in whole.rglob("*")}
    verify_cache(whole)
    assert {file: os.stat(file).st_mtime_ns for file in whole.rglob("*")} == before


@settings(max_examples=10, deadline=None)
@given(n_rows=st.integers(1, 70), chunk_rows=st.integers(1, 9), n_masked=st.integers(0, 2))
def test_what_is_written_verifies(n_rows, chunk_rows, n_masked):
    plan = make_plan(n_rows=n_rows, chunk_rows=chunk_rows, shard_rows=3 * chunk_rows, n_masked=n_masked)
    with scratch() as folder:
        assert verify_cache(make_cache(folder / "cache", plan)) == []
