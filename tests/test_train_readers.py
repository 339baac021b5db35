"""Readers: the rows of the cache, through a mapping and with positioned reads; damage found in both; memory bounded."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cache_fixtures import scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import make_loader_cache
from train_fixtures import DATA

from cache_spec import ActivationCache, CacheDamaged, UserError
from cache_spec.layout import activation_file
from train import readers
from train.config import DataConfig
from train.loader import MixedBatchLoader
from train.readers import PositionedReader, choose_io, file_system, open_reader
from train.recent import Recent

ROOT = Path(__file__).parent.parent
IO = pytest.mark.parametrize("io", ["mmap", "pread"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_loader_cache(tmp_path_factory.mktemp("readers") / "cache")


def damage(cache: ActivationCache, file: tuple[str, str, int], row: int = 3) -> Path:
    """Flip one bit of a row of a shard."""
    path = cache.path / activation_file(*file)
    data = bytearray(path.read_bytes())
    data[row * 2 * cache.hook(file[0]).d_model] ^= 1
    path.write_bytes(data)
    return path


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sets(st.integers(0, 63), min_size=1).map(sorted),
    max_gap=st.sampled_from([0, 16, 100, 1 << 16]),
    vector=st.integers(1, 5),
    file=st.tuples(st.sampled_from(["layer_1", "layer_3"]), st.sampled_from(["clean", "masked"]), st.integers(0, 3)),
    io=st.sampled_from(["mmap", "pread"]),
    sample=st.booleans(),
)
def test_any_rows_are_the_cache_s(cache, rows, max_gap, vector, file, io, sample):
    """Wherever a positioned read is parted."""
    hook, variant, shard = file
    reader = open_reader(io, cache, 4)
    out = np.full((len(rows), cache.hook(hook).d_model), np.nan, np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_GAP", max_gap)
        patch.setattr(readers, "_VECTOR", vector)
        (reader.read_sample if sample else reader.read)(file, np.array(rows, np.uint32), out)
    assert (out == cache.read(hook, variant, np.array(rows) + shard * 64)).all()


@given(sizes=st.lists(st.integers(1, 97), min_size=1), rows=st.sets(st.integers(0, 63), min_size=1).map(sorted))
@settings(max_examples=40, deadline=None)
def test_a_read_that_gives_less_than_asked_goes_on_where_it_stopped(cache, sizes, rows):
    reader, preadv, calls = PositionedReader(cache, 4), os.preadv, []

    def short(fd, buffers, offset):
        n = sizes[len(calls) % len(sizes)]
        calls.append(n)
        few = []
        for buffer in buffers:
            few.append(buffer[:n])
            n -= len(few[-1])
        return preadv(fd, few, offset)

    out = np.empty((len(rows), 8), np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", short)
        reader.read(("layer_1", "masked", 2), np.array(rows), out)
    assert (out == cache.read("layer_1", "masked", np.array(rows) + 128)).all()


def test_rows_close_together_are_one_read_and_far_ones_are_not(cache, monkeypatch):
    calls, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: calls.append(offset) or preadv(fd, buffers, offset))
    monkeypatch.setattr(readers, "MAX_GAP", 5 * 16)
    reader, out = PositionedReader(cache, 4), np.empty((6, 8), np.float16)
    reader.read(("layer_1", "clean", 0), np.array([2, 3, 4, 6, 12, 40]), out)
    assert calls == [2 * 16, 40 * 16]


def read_epoch(cache: ActivationCache, data: DataConfig, rows: list[np.ndarray]) -> None:
    loader = MixedBatchLoader(cache, data)
    rows += (loader.read(step).row for step in range(loader.n_batches))


@IO
@pytest.mark.parametrize("variant", ["clean", "masked"])
def test_a_damaged_shard_is_named_before_any_of_its_rows_is_used(io, variant):
    """In every shard: before training with a mapping, at first use with positioned reads."""
    for shard in range(3):
        with scratch() as folder:
            cache = make_loader_cache(folder / "cache")
            path = damage(cache, ("layer_1", variant, shard), row=60)
            data = DataConfig(hook="layer_1", n_tokens=320, batch_size=16, io=io)
            rows: list[np.ndarray] = []
            with pytest.raises(CacheDamaged) as caught:
                read_epoch(cache, data, rows)
            assert io == "pread" or not rows
            assert str(path) in str(caught.value)
            assert "fails its checksum in rows" in str(caught.value)
            assert "run the same harvest to make the shard again" in str(caught.value)
            assert not any((row // 64 == shard).any() for row in rows)


@pytest.mark.parametrize("variant", ["clean", "masked"])
def test_damage_at_the_target_of_a_transcoder_is_found_before_training(variant):
    with scratch() as folder:
        cache = make_loader_cache(folder / "cache")
        damage(cache, ("layer_3", variant, 2))
        data = DataConfig(hook="layer_1", target_hook="layer_3", n_tokens=320, batch_size=16, io="mmap")
        with pytest.raises(CacheDamaged, match=f"layer_3/{variant}/c/2/0 fails its checksum"):
            MixedBatchLoader(cache, data)


def test_damage_in_the_sample_is_found_before_training_with_positioned_reads_too(monkeypatch):
    monkeypatch.setattr("train.loader.SAMPLE_ROWS", 3 * 8)
    data = DataConfig(hook="layer_1", n_tokens=320, batch_size=16, io="pread")
    with scratch() as folder:
        cache = make_loader_cache(folder / "cache")
        damage(cache, ("layer_1", "masked", 1), row=60)
        with pytest.raises(CacheDamaged, match="masked/c/1/0 fails its checksum in rows 112 to 127"):
            read_epoch(cache, data, [])
        MixedBatchLoader(cache, data)  # what training comes to first is not among the chunks of the sample
        damage(cache, ("layer_1", "masked", 1), row=3)
        with pytest.raises(CacheDamaged, match="masked/c/1/0 fails its checksum in rows 64 to 79"):
            MixedBatchLoader(cache, data)


@IO
def test_an_unchecked_cache_is_taken_as_it_is(io):
    with scratch() as folder:
        cache = make_loader_cache(folder / "cache")
        damage(cache, ("layer_1", "clean", 0))
        unchecked = ActivationCache.open(cache.path, check=False)
        data = DataConfig(hook="layer_1", n_tokens=32, batch_size=16, io=io)
        loader = MixedBatchLoader(unchecked, data)
        rows = loader.read(0)
        true = unchecked.read("layer_1", "clean", rows.row).astype(np.float32) * loader.hook.scale_factor
        np.testing.assert_allclose(rows.clean.numpy(), true / loader.scale.norm_factor, rtol=1e-6)
        with pytest.raises(CacheDamaged, match="clean/c/0/0"):  # where it is checked, the same file is refused
            read_epoch(cache, data, [])


def test_a_file_that_becomes_shorter_is_an_error_and_not_zeros():
    with scratch() as folder:
        cache = make_loader_cache(folder / "cache")
        reader, out = PositionedReader(cache, 4), np.empty((64, 8), np.float16)
        reader.read(("layer_1", "clean", 1), np.arange(64), out)
        os.truncate(cache.path / activation_file("layer_1", "clean", 1), 700)
        with pytest.raises(CacheDamaged, match="c/1/0 became shorter while it was read"):
            reader.read(("layer_1", "clean", 1), np.arange(64), out)


@IO
def test_files_are_closed_when_they_are_many(cache, io):
    before = len(os.listdir("/proc/self/fd"))
    reader, out = open_reader(io, cache, 2), np.empty((1, 8), np.float16)
    for _ in range(3):
        for shard in range(4):
            reader.read(("layer_1", "clean", shard), np.array([shard]), out)
            assert len(os.listdir("/proc/self/fd")) <= before + 3
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_latest_values_are_kept_and_made_once_whoever_asks():
    recent, made = Recent(2), []

    def make(key):
        time.sleep(0.002)
        made.append(key)
        return key

    threads = [threading.Thread(target=lambda k=k: recent.get(k % 2, make)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [0, 1]
    assert recent.get(2, lambda key: key) == 2
    assert sorted(recent) == [*sorted({0, 1} & set(recent)), 2]
    assert len(list(recent)) == 2


def test_a_value_that_could_not_be_made_is_tried_again():
    recent = Recent(2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda _: 1 // 0)
    assert list(recent) == []
    assert recent.get("a", lambda _: 5) == 5


def test_auto_maps_what_fits_in_half_of_memory_and_says_so(tmp_path, monkeypatch):
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(readers, "file_system", lambda path: "ext4")
    assert choose_io("auto", tmp_path, 500_000, "") == (
        "mmap",
        "mmap: 500.0 kB to read fit in 50% of the machine's 1.0 MB",
    )
    assert choose_io("auto", tmp_path, 500_001, "")[0] == "pread"
    assert "do not fit in 50%" in choose_io("auto", tmp_path, 500_001, "")[1]
    assert choose_io("mmap", tmp_path, 10**9, "") == ("mmap", "mmap, as asked for")
    assert choose_io("pread", tmp_path, 1, "")[0] == "pread"
    for kind in ("nfs4", "fuse.sshfs", "lustre"):
        monkeypatch.setattr(readers, "file_system", lambda path, kind=kind: kind)
        assert choose_io("auto", tmp_path, 1, "") == ("pread", f"pread: the cache is on {kind}")
    with pytest.raises(UserError, match="auto, mmap, pread"):
        choose_io("zarr", tmp_path, 1, "")


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path):
    mounts = tmp_path / "mountinfo"
    inner = tmp_path / "ä b"
    inner.mkdir()
    escaped = str(inner).replace(" ", "\\040")
    mounts.write_text(
        f"36 21 0:40 / {escaped} rw shared:7 master:1 - nfs4 server:/x rw\n"
        f"37 21 0:41 / {escaped}c rw - tmpfs none rw\n"
        "38 21 0:42 / /elsewhere rw - fuse.x none rw\n"
        "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
    )
    assert file_system(inner / "cache", mounts) == "nfs4"
    assert file_system(tmp_path, mounts) == "ext4"
    assert file_system(tmp_path / "ä bc", mounts) == "tmpfs"
    assert file_system(tmp_path, tmp_path / "nothing") == ""


def test_the_loader_counts_only_what_it_will_read(cache, monkeypatch):
    """Train shards of the hook points and variants in use decide whether a cache fits."""
    seen = []
    monkeypatch.setattr(
        "train.loader.choose_io", lambda io, path, n_bytes, url: seen.append(n_bytes) or ("mmap", "why")
    )
    file = cache.path / activation_file("layer_1", "clean", 0)
    MixedBatchLoader(cache, DATA, with_masked=False)
    assert MixedBatchLoader(cache, DATA).io_note == "why"
    assert seen == [3 * file.stat().st_size, 6 * file.stat().st_size]


def test_a_long_check_shows_how_far_it_is(cache, monkeypatch, capsys):
    MixedBatchLoader(cache, DATA)
    monkeypatch.setattr("train.loader._LONG_CHECK", 1)
    MixedBatchLoader(cache, DATA)
    assert capsys.readouterr().err.count("checking layer_1: 3/3 shards") == 1


EPOCH = """
import re, sys
from pathlib import Path
from cache_spec import ActivationCache
from train.config import DataConfig
from train.loader import MixedBatchLoader

def most_resident(path, batch_size):
    data = DataConfig(hook="layer_1", n_tokens=1 << 18, batch_size=batch_size, io=sys.argv[1])
    loader = MixedBatchLoader(ActivationCache.open(path), data)
    with loader.stream(0, loader.n_batches) as stream:
        return max(resident() for rows in stream)

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = most_resident(sys.argv[2], 16)
print(most_resident(sys.argv[3], 512) - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """400 MB in sixteen shards."""
    path = tmp_path_factory.mktemp("large") / "cache"
    return make_loader_cache(
        path, n_rows=17 * 4096, n_train=16 * 4096, shard_rows=4096, chunk_rows=1024, widths={1: (1536, 1.0)}
    )


@IO
def test_memory_does_not_grow_with_the_cache(cache, large, io):
    """From the loader's making (whose sample is all of this cache) to the end of an epoch; mapped pages count."""
    n_bytes = sum((large.path / activation_file("layer_1", v, 0)).stat().st_size for v in ("clean", "masked")) * 16
    command = [sys.executable, "-c", EPOCH, io, str(cache.path), str(large.path)]
    freed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back: holes in a heap are no growth
    run = subprocess.run(command, cwd=ROOT, env=freed, capture_output=True, text=True, check=True)
    assert int(run.stdout) < n_bytes / 3, f"{int(run.stdout):,} of {n_bytes:,} bytes"
