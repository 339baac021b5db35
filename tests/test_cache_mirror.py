"""Copies of a remote cache: what a folder would give, whole or not at all, whatever the store or others do."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cache_fixtures import make_cache, make_plan
from store_fixtures import BUCKET, IMPATIENT, Proxy, credentials

from cache_spec import ActivationCache, CacheDamaged, CacheIncomplete, CacheNotFound
from cache_spec import mirror as mirror_module
from cache_spec.copies import Copies
from cache_spec.errors import ObjectMissing, RoomTooSmall, StoreError
from cache_spec.layout import PLAN, activation_file, column_types, record_file
from cache_spec.mirror import Mirror
from cache_spec.remote import open_cache
from cache_spec.state import read_plan
from cache_spec.store import open_store

ONE = activation_file("layer_1", "clean", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("mirror") / "cache.zarr", make_plan())


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    """One inner chunk a request, as large ones are."""
    monkeypatch.setattr(mirror_module, "RANGE_BYTES", 1)


def put(folder: Path, url: str) -> str:
    store = open_store(url, IMPATIENT)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


@pytest.fixture(scope="module")
def uploaded(folder, store_server) -> str:
    """The URL of the cache in the store; `store_url` or `proxy` lead there."""
    with pytest.MonkeyPatch.context() as patch:
        credentials(patch, store_server)
        return put(folder, f"s3://{BUCKET}/mirror/cache.zarr")


def opened(url: str, copies: Path, n_bytes: int = 10**9, **how) -> ActivationCache:
    return open_cache(url, Copies(folder=copies, n_bytes=n_bytes, patience=IMPATIENT), **how)


def mirror_of(cache: ActivationCache) -> Mirror:
    assert isinstance(cache.files, Mirror)
    return cache.files


def check_same(cache: ActivationCache, local: ActivationCache) -> None:
    assert cache.shards == local.shards
    assert cache.records == local.records
    for hook in local.plan.hooks:
        for variant in local.plan.variants:
            means = [each.moments(hook.name, variant.name).mean for each in (cache, local)]
            assert np.array_equal(means[0], means[1])
            for shard in local.shards:
                own, other = (each.activations(hook.name, variant.name, shard) for each in (cache, local))
                assert np.array_equal(own, other)
                own, other = (each.chunk(hook.name, variant.name, shard, 0) for each in (cache, local))
                assert np.array_equal(own, other, equal_nan=True)
    for name in column_types(local.plan):
        for shard in local.shards:
            assert np.array_equal(cache.column(name, shard), local.column(name, shard))


def files_below(copies: Path) -> list[Path]:
    return [path for path in copies.rglob("*") if path.is_file() and "_granary" not in path.parts]


def test_a_remote_cache_is_what_its_folder_is(folder, uploaded, store_url, tmp_path):
    local = ActivationCache.open(folder)
    cache = opened(uploaded, tmp_path / "copies")
    assert cache.place == uploaded
    check_same(cache, local)
    rows = np.array([140, 3, 3, 70])
    assert np.array_equal(cache.read("layer_1", "masked", rows), local.read("layer_1", "masked", rows))
    assert not list((tmp_path / "copies").rglob("*.partial"))


def test_a_file_url_is_a_store_too(folder, tmp_path):
    check_same(opened(f"file://{folder}", tmp_path / "copies"), ActivationCache.open(folder))


def test_a_folder_is_opened_as_ever(folder):
    assert open_cache(folder).path == folder
    assert open_cache(str(folder)).place == str(folder)


def test_an_unfinished_cache_is_read_by_its_records(tmp_path):
    part = make_cache(tmp_path / "part.zarr", make_plan(), shards=range(2), finalize=False)
    url = f"file://{part}"
    with pytest.raises(CacheIncomplete, match=f"{url} is not finished: 2 of 3 shards"):
        opened(url, tmp_path / "copies")
    cache = opened(url, tmp_path / "copies", allow_partial=True)
    check_same(cache, ActivationCache.open(part, allow_partial=True))


def test_what_is_no_cache_or_lacks_a_file_is_said_by_name(folder, tmp_path):
    with pytest.raises(CacheNotFound, match=r"there is nothing at file:.*nowhere"):
        opened(f"file://{tmp_path}/nowhere", tmp_path / "copies")
    copy = make_cache(tmp_path / "copy.zarr", make_plan())
    url = f"file://{copy}"
    cache = opened(url, tmp_path / "copies")
    (copy / ONE).rename(tmp_path / "whole")
    with pytest.raises(CacheDamaged, match=f"{url}/{ONE} is missing; delete {url}/{record_file(1)} and run"):
        cache.activations("layer_1", "clean", 1)
    with pytest.raises(CacheDamaged, match=f"{url}/{ONE} is missing"):
        cache.chunk("layer_1", "clean", 1, 0)
    with pytest.raises(CacheDamaged, match=f"{url}/{ONE} is missing; to make the shard again delete"):
        opened(url, tmp_path / "copies")
    whole = (tmp_path / "whole").read_bytes()
    (copy / ONE).write_bytes(b"short")
    with pytest.raises(CacheDamaged, match=f"{url}/{ONE} has 5 bytes instead of"):
        opened(url, tmp_path / "copies")
    (copy / ONE).write_bytes(whole)
    (copy / "layer_1" / "clean" / "zarr.json").write_text("{}\n")
    with pytest.raises(CacheDamaged, match=r"layer_1/clean/zarr\.json does not describe what the plan says"):
        opened(url, tmp_path / "copies")
    (copy / PLAN).unlink()
    with pytest.raises(CacheIncomplete, match="was being created"):
        opened(url, tmp_path / "copies")


@pytest.mark.parametrize("kind", ["drop", "status", "truncate", "corrupt", "slow"])
def test_a_fault_on_the_way_changes_nothing(folder, uploaded, proxy: Proxy, tmp_path, kind):
    """Twice on each of: the plan, a column, moments, activations."""
    how = {"seconds": 0.02, "n_bytes": 40} if kind == "slow" else {"n_bytes": 20}
    for match in ("clean/c/1", "masked/c/0", "rows/flags/c/1", "clean_mean/c/0"):
        proxy.fail(kind, match=match, times=2, **how)
    if kind != "corrupt":  # the plan is known by no checksum but what it says itself
        proxy.fail(kind, match="plan.json", times=2, **how)
    check_same(opened(uploaded, tmp_path / "copies"), ActivationCache.open(folder))
    if kind == "slow":  # asked for once
        assert proxy.n_failed >= 5
    else:
        assert proxy.n_failed == (8 if kind == "corrupt" else 10)


def test_what_arrives_damaged_again_and_again_is_refused_by_name_and_leaves_nothing(
    folder, uploaded, proxy: Proxy, tmp_path
):
    cache = opened(uploaded, tmp_path / "copies")
    proxy.fail("corrupt", match=ONE, for_seconds=60, n_bytes=7)
    with pytest.raises(
        CacheDamaged, match=rf"{uploaded}/{ONE} fails its checksum in rows \d+ to \d+, 3 times in a row"
    ):
        cache.activations("layer_1", "clean", 1)
    with pytest.raises(CacheDamaged, match=f"{ONE} fails its checksum in rows 64 to 79"):
        cache.chunk("layer_1", "clean", 1, 0)
    proxy.fail("corrupt", match="rows/flags/c/0", for_seconds=60, n_bytes=7)
    with pytest.raises(CacheDamaged, match="rows/flags/c/0 fails its checksum, 3 times"):
        cache.column("flags", 0)
    assert files_below(tmp_path / "copies") == []
    proxy.faults.clear()
    check_same(cache, ActivationCache.open(folder))


def test_a_store_that_stays_away_is_one_sentence(folder, uploaded, proxy: Proxy, tmp_path):
    cache = opened(uploaded, tmp_path / "copies")
    proxy.fail("status", match=ONE, for_seconds=60, status=503)
    with pytest.raises(StoreError, match=f"{ONE} did not come through"):
        cache.activations("layer_1", "clean", 1)
    assert files_below(tmp_path / "copies") == []


def test_a_copy_that_was_changed_on_the_disk_is_fetched_again(folder, tmp_path):
    url, local = f"file://{folder}", ActivationCache.open(folder)
    first = opened(url, tmp_path / "copies")
    check_same(first, local)
    for path in files_below(tmp_path / "copies"):
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data)
    check_same(opened(url, tmp_path / "copies"), local)
    for path in files_below(tmp_path / "copies"):
        path.write_bytes(path.read_bytes()[:-9])
    check_same(opened(url, tmp_path / "copies"), local)


def test_a_second_look_fetches_nothing(folder, uploaded, proxy: Proxy, tmp_path):
    cache = opened(uploaded, tmp_path / "copies")
    check_same(cache, ActivationCache.open(folder))
    proxy.requests.clear()
    check_same(cache, ActivationCache.open(folder))
    assert proxy.requests == []
    again = opened(uploaded, tmp_path / "copies")
    check_same(again, ActivationCache.open(folder))
    assert not [line for line in proxy.requests if "/c/" in line]


def test_another_cache_at_the_same_url_has_other_copies(tmp_path):
    place, other = tmp_path / "cache.zarr", make_plan(seed=1)
    make_cache(place, make_plan())
    first = opened(f"file://{place}", tmp_path / "copies")
    check_same(first, ActivationCache.open(place))
    place.rename(tmp_path / "former.zarr")
    make_cache(place, other)
    second = opened(f"file://{place}", tmp_path / "copies")
    check_same(second, ActivationCache.open(place))
    assert [read_plan(cache.path) for cache in (first, second)] == [make_plan(), other]


def test_many_threads_fetch_a_file_once(folder, uploaded, proxy: Proxy, tmp_path):
    cache = opened(uploaded, tmp_path / "copies")
    proxy.fail("slow", match=ONE, times=1, seconds=0.05, n_bytes=50)
    proxy.requests.clear()
    threads = [threading.Thread(target=cache.activations, args=("layer_1", "clean", 1)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([line for line in proxy.requests if ONE in line]) == 4  # its inner chunks


_OTHER = """
import sys
from pathlib import Path
from cache_spec.copies import Copies
from cache_spec.remote import open_cache
cache = open_cache(sys.argv[1], Copies(folder=Path(sys.argv[2]), n_bytes=10**9))
print(sum(float(cache.activations("layer_1", "clean", shard).sum()) for shard in cache.shards))
"""


def test_processes_that_share_a_folder_fetch_each_file_once(folder, uploaded, proxy: Proxy, tmp_path):
    proxy.fail("slow", match=ONE, times=1, seconds=0.2, n_bytes=50)
    proxy.requests.clear()
    command = [sys.executable, "-c", _OTHER, uploaded, str(tmp_path / "copies")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    local = ActivationCache.open(folder)
    assert {float(text) for text in sums} == {
        sum(float(local.activations("layer_1", "clean", shard).sum()) for shard in local.shards)
    }
    fetched = [line for line in proxy.requests if "layer_1/clean/c/" in line]
    assert len(fetched) == len(local.shards)


def test_a_killed_process_leaves_nothing_that_looks_whole_and_nobody_waits_for_it(
    folder, uploaded, proxy: Proxy, tmp_path
):
    proxy.fail("slow", match=ONE, times=1, seconds=5.0, n_bytes=50)
    process = subprocess.Popen([sys.executable, "-c", _OTHER, uploaded, str(tmp_path / "copies")])
    deadline = time.monotonic() + 30
    while not any(ONE in line for line in proxy.requests) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    began = time.monotonic()
    check_same(opened(uploaded, tmp_path / "copies"), ActivationCache.open(folder))
    assert time.monotonic() - began < 20


def test_copies_stay_within_their_bytes_and_the_oldest_go_first(folder, tmp_path):
    local, one = ActivationCache.open(folder), (folder / ONE).stat().st_size
    cache = opened(f"file://{folder}", tmp_path / "copies", n_bytes=3 * one)
    for shard in (0, 1, 0, 2):
        for variant in ("clean", "masked"):
            expected = local.activations("layer_1", variant, shard)
            assert np.array_equal(cache.activations("layer_1", variant, shard), expected)
        there = {path.relative_to(cache.path).as_posix() for path in files_below(tmp_path / "copies")}
        assert sum(path.stat().st_size for path in files_below(tmp_path / "copies")) <= 3 * one
        assert activation_file("layer_1", "masked", shard) in there
        assert activation_file("layer_1", "clean", shard) in there


def test_a_folder_of_copies_among_other_things_loses_none_of_them(folder, tmp_path):
    """The user's own folder is given: with a thesis in it, and the cache itself."""
    shutil.copytree(folder, tmp_path / "cache.zarr")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "data.bin").write_bytes(bytes(10**4))
    there = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in there:
        os.utime(path, (0, 0))
    one = (folder / ONE).stat().st_size
    cache = opened(f"file://{tmp_path}/cache.zarr", tmp_path, n_bytes=2 * one)
    for shard in cache.shards:
        cache.activations("layer_1", "clean", shard)
        cache.activations("layer_1", "masked", shard)
    assert [path for path in there if not path.exists()] == []
    kept = [path for path in files_below(tmp_path) if path not in there]
    assert sum(path.stat().st_size for path in kept) <= 2 * one


def test_a_copy_that_is_mapped_stays_until_nobody_has_any_part_of_it(folder, tmp_path):
    one = (folder / ONE).stat().st_size
    cache = opened(f"file://{folder}", tmp_path / "copies", n_bytes=2 * one)
    mirror_of(cache).room.patience = 0.1
    kept = cache.activations("layer_1", "clean", 0)[5:9]
    other = cache.activations("layer_1", "clean", 1)
    with pytest.raises(
        RoomTooSmall, match=rf"--cache-bytes {2 * one:,} is too little.*give --cache-bytes {3 * one} or"
    ):
        cache.activations("layer_1", "masked", 0)
    assert (cache.path / activation_file("layer_1", "clean", 0)).exists()
    del other
    assert cache.activations("layer_1", "masked", 0).shape == (64, 6)
    assert (cache.path / activation_file("layer_1", "clean", 0)).exists()
    assert not (cache.path / ONE).exists()
    del kept
    cache.activations("layer_1", "masked", 1)
    assert not (cache.path / activation_file("layer_1", "clean", 0)).exists()


def test_holders_are_asked_to_let_go(folder, tmp_path):
    one = (folder / ONE).stat().st_size
    cache = opened(f"file://{folder}", tmp_path / "copies", n_bytes=2 * one)
    held = [cache.open_activations("layer_1", "clean", shard) for shard in (0, 1)]

    def let_go() -> bool:
        if held:
            held.pop().close()
            return True
        return False

    mirror_of(cache).room.holders.append(let_go)
    cache.activations("layer_1", "masked", 0)
    assert len(held) == 1
    held.pop().close()


def test_a_file_larger_than_all_copies_may_be_is_refused_at_once(folder, tmp_path):
    cache = opened(f"file://{folder}", tmp_path / "copies", n_bytes=100)
    with pytest.raises(RoomTooSmall, match="--cache-bytes 100 is too little"):
        cache.activations("layer_1", "clean", 0)


def test_a_missing_planner_file_is_no_planner_file(folder, tmp_path):
    cache = opened(f"file://{folder}", tmp_path / "copies")
    with pytest.raises(ObjectMissing):
        cache.files.gather(["_granary/windows.npy"])
