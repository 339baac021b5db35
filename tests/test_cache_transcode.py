"""Archives: smaller, readable by any Zarr reader, and the way back gives the same bytes in every file."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from cache_fixtures import make_cache, make_hook, make_plan, make_shard, scratch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import (
    ActivationCache,
    CacheConflict,
    CacheError,
    CacheIncomplete,
    DiskFull,
    UserError,
    create_cache,
    finalize_cache,
    transcode,
    verify_cache,
    write_shard,
)
from cache_spec.files import Partial

ROOT = Path(__file__).parent.parent
PLAN = make_plan(layers=(1, 3))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def path(tmp_path) -> Path:
    return make_cache(tmp_path / "cache", PLAN)


@pytest.fixture
def archive(path, tmp_path) -> Path:
    transcode(path, tmp_path / "archive")
    return tmp_path / "archive"


@given(
    n_rows=st.integers(1, 90),
    chunk_rows=st.integers(1, 13),
    n_chunks=st.integers(1, 5),
    d_model=st.integers(1, 9),
    level=st.integers(1, 9),
)
@settings(max_examples=20, deadline=None)
def test_there_and_back_is_the_same_in_every_file(n_rows, chunk_rows, n_chunks, d_model, level):
    plan = make_plan(n_rows=n_rows, chunk_rows=chunk_rows, shard_rows=chunk_rows * n_chunks, d_model=d_model)
    with scratch() as folder:
        path = make_cache(folder / "cache", plan)
        transcode(path, folder / "archive", level=level)
        assert verify_cache(folder / "archive") == []
        transcode(folder / "archive", folder / "again")
        assert contents(folder / "again") == contents(path)


def test_zarr_and_tensorstore_open_an_archive_by_themselves(path, archive):
    for name in ("layer_1/clean", "layer_3/masked", "layer_1/clean_mean", "rows/token"):
        there: np.ndarray = zarr.open(path, mode="r")[name][...]  # pyright: ignore[reportAssignmentType, reportIndexIssue, reportArgumentType, reportCallIssue]
        packed: np.ndarray = zarr.open(archive, mode="r")[name][...]  # pyright: ignore[reportAssignmentType, reportIndexIssue, reportArgumentType, reportCallIssue]
        assert packed.tobytes() == there.tobytes()
        store = {"driver": "file", "path": str(archive / name)}
        other = tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result()
        assert other.tobytes() == there.tobytes()


def test_archives_of_one_cache_are_equal(tmp_path):
    """By the command, since a process that imported Zarr has Blosc's own threads turned off."""
    plan = make_plan(n_rows=2048, shard_rows=2048, chunk_rows=1024, d_model=2304, n_masked=0)  # Blosc splits 5 MB
    path = make_cache(tmp_path / "cache", plan)
    for name in ("one", "two"):
        command = [sys.executable, "-m", "cache_spec", "transcode", path, tmp_path / name]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_repetitive_rows_become_smaller(tmp_path):
    plan = make_plan(n_rows=4096, shard_rows=2048, chunk_rows=1024, d_model=64)
    path = tmp_path / "cache"
    create_cache(path, plan)
    for shard in range(plan.n_shards):
        activations, columns = make_shard(plan, shard)
        same = {key: np.ones_like(rows) for key, rows in activations.items()}
        write_shard(path, plan, shard, same, columns)
    finalize_cache(path)
    before, after = transcode(path, tmp_path / "archive")
    assert after < before / 3
    on_disk = sum(len(data) for name, data in contents(tmp_path / "archive").items() if "/c/" in name)
    assert on_disk == after


def test_activations_of_an_archive_are_not_mapped_but_its_columns_and_moments_are_read(path, archive):
    cache, plain = ActivationCache.open(archive), ActivationCache.open(path)
    assert cache.is_archive
    assert not plain.is_archive
    with pytest.raises(CacheError, match="python -m cache_spec transcode"):
        cache.activations("1", "clean", 0)
    assert np.array_equal(cache.column("doc", 1), plain.column("doc", 1))
    assert np.array_equal(cache.moments("1", "clean").m2, plain.moments("1", "clean").m2, equal_nan=True)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_in_any_file_of_an_archive_is_found_and_the_file_named(archive_once, data):
    files = sorted(name for name, content in contents(archive_once).items() if content)
    name = data.draw(st.sampled_from(files))
    original = (archive_once / name).read_bytes()
    place, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(original)
    changed[place] ^= 1 << bit
    (archive_once / name).write_bytes(changed)
    try:
        named = [problem.file for problem in verify_cache(archive_once)]
    except CacheError as error:  # without a sound plan there is nothing to compare with
        named = [name] if Path(name).name in str(error) else []
    finally:
        (archive_once / name).write_bytes(original)
    assert name in named
    assert verify_cache(archive_once) == []


@pytest.fixture(scope="module")
def archive_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    transcode(make_cache(folder / "cache", make_plan()), folder / "archive")
    return folder / "archive"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A cache and its archive with a planner's file, so with every kind of file that there is."""
    folder = tmp_path_factory.mktemp("damage")
    transcode(make_planned(folder / "cache"), folder / "archive")
    return folder


@given(data=st.data())
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("which", ["cache", "archive"])
def test_a_flipped_bit_in_the_source_is_refused_or_does_no_harm(whole, which, data):
    source = whole / which
    name = data.draw(st.sampled_from(sorted(name for name, content in contents(source).items() if content)))
    original = (source / name).read_bytes()
    place = data.draw(st.integers(0, len(original) - 1) | st.just(len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    (source / name).write_bytes(changed)
    try:
        with scratch() as folder:
            try:
                transcode(source, folder / "out")
            except CacheError as error:
                refusal = str(error)
                with pytest.raises(CacheError):
                    ActivationCache.open(folder / "out")
            else:  # such as a space between two words of JSON, which is not copied
                refusal = Path(name).name
                assert verify_cache(folder / "out") == []
        assert Path(name).name in refusal
    finally:
        (source / name).write_bytes(original)


def test_files_of_another_planning_are_not_overwritten(tmp_path):
    path, out = make_planned(tmp_path / "cache"), tmp_path / "out"
    for begun in (False, True):
        if begun:
            create_cache(out, make_plan(seed=9))
            (out / "_granary/plan.json").unlink()
        (out / "_granary").mkdir(parents=True, exist_ok=True)
        (out / "_granary/windows.npy").write_bytes(b"of another harvest")
        before = contents(out)
        with pytest.raises(CacheConflict):
            transcode(path, out)
        assert contents(out) == before


def test_an_unfinished_cache_is_refused(tmp_path):
    path = make_cache(tmp_path / "cache", PLAN, shards=range(2), finalize=False)
    with pytest.raises(CacheIncomplete, match="2 of 3"):
        transcode(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(path, archive, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    other = make_cache(tmp_path / "other", dataclasses.replace(PLAN, seed=5))
    for out in (tmp_path / "notes", other, path, path / "inside", tmp_path):
        before = contents(tmp_path)
        with pytest.raises(CacheConflict):
            transcode(path, out)
        assert contents(tmp_path) == before
    with pytest.raises(CacheConflict, match="level 5"):
        transcode(path, archive, level=3)
    with pytest.raises(UserError, match="--level is 12"):
        transcode(path, tmp_path / "new", level=12)


def make_planned(path: Path) -> Path:
    """A cache with the planner's windows beside its plan, and a scale factor."""
    data = io.BytesIO()
    np.save(data, np.arange(20, dtype=np.uint32).reshape(2, 10))
    source = {"id": "text", "windows_sha256": hashlib.sha256(data.getvalue()).hexdigest()}
    plan = dataclasses.replace(make_plan(), source=source, hooks=(make_hook(1, 6, 16.0),))
    (path / "_granary").mkdir(parents=True)
    (path / "_granary/windows.npy").write_bytes(data.getvalue())
    return make_cache(path, plan)


def test_planner_files_come_along_and_scale_factors_stay(tmp_path):
    path = make_planned(tmp_path / "cache")
    transcode(str(path), str(tmp_path / "archive"))
    assert verify_cache(tmp_path / "archive") == []
    assert ActivationCache.open(tmp_path / "archive").hook("1").scale_factor == 16.0
    transcode(tmp_path / "archive", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(path)


def test_a_full_disk_leaves_what_is_whole_and_the_same_command_goes_on(path, tmp_path, monkeypatch):
    left = [11]

    def write(self, data, plain=Partial.write):
        left[0] -= "/c/1/" in str(self.final)
        if not left[0]:
            raise OSError(28, "No space left on device")
        plain(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Partial, "write", write)
        with pytest.raises(DiskFull, match="run the same command again"):
            transcode(path, tmp_path / "out")
    assert ActivationCache.open(tmp_path / "out", allow_partial=True).shards == (0,)
    transcode(path, tmp_path / "out")
    transcode(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(path)


CRASHER = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from cache_spec import *
source, out = Path(sys.argv[1]), Path(sys.argv[2])

def run(n):
    child = os.fork()
    if child == 0:
        left = [n]
        for name in ("write", "replace", "link", "unlink"):
            def counted(*args, call=getattr(os, name), **kwargs):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return call(*args, **kwargs)
            setattr(os, name, counted)
        transcode(source, out / str(n))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

n = 0
while run(n) == 9:
    try:
        cache = ActivationCache.open(out / str(n), allow_partial=True)
        wrong = [p for p in verify_cache(out / str(n)) if p.kind == "damaged"]
        print("WRONG" if wrong else len(cache.shards))
    except (CacheNotFound, CacheIncomplete):
        print("begun")
    transcode(source, out / str(n))
    if verify_cache(out / str(n)):
        print("WRONG")
    n += 7
"""


def test_a_transcoding_killed_before_any_seventh_system_call_goes_on(tmp_path):
    code = CRASHER.format(paths=[str(ROOT), str(ROOT / "tests")])
    path = make_cache(tmp_path / "cache", make_plan(n_rows=100))
    with scratch() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    states = done.stdout.split()
    assert "WRONG" not in states
    assert list(dict.fromkeys(states)) == ["begun", "0", "1", "2"]
