"""A cache in a stranger's store: no object is read beyond what it may have, and the sentence names its URL."""

import re
from pathlib import Path

import pytest
from cache_fixtures import make_cache, make_plan
from fuzz_fixtures import bounded
from store_fixtures import IMPATIENT, Proxy
from test_cache_truncated import with_planner_files

from cache_spec import ActivationCache, CacheDamaged, CacheError, state, verify_cache
from cache_spec.copies import Copies
from cache_spec.errors import RoomTooSmall
from cache_spec.layout import MANIFEST, PLAN, ROOT, UPLOADS, planner_files, record_file
from cache_spec.publish import settle
from cache_spec.remote import open_cache
from cache_spec.store import open_store
from cache_spec.store_path import StorePath, place_of


def opened(url: str, copies: Path, n_bytes: int = 10**9) -> ActivationCache:
    return open_cache(url, Copies(folder=copies, n_bytes=n_bytes, patience=IMPATIENT), allow_partial=True)


def refusal(found: str, file: str) -> str:
    return re.escape(f"{found}/{file} has {2**40:,} bytes")


@pytest.mark.parametrize("file", [PLAN, ROOT, MANIFEST, f"layer_1/clean/{ROOT}", record_file(1), "rows/flags/c/1"])
def test_an_object_of_a_terabyte_is_refused_by_name_and_not_read(tmp_path, file):
    """An unfinished cache is read by its records, a finished one by its manifest."""
    pytest.importorskip("obstore")
    folder = make_cache(tmp_path / "cache.zarr", make_plan(), finalize=file != record_file(1))
    url = f"file://{folder}"
    with (folder / file).open("r+b") as large:
        large.truncate(2**40)
    with bounded(), pytest.raises(CacheDamaged, match=refusal(url, file)):
        opened(url, tmp_path / "copies")
    with bounded():
        if file == PLAN:  # without which there is nothing to compare
            with pytest.raises(CacheDamaged, match=refusal(url, file)):
                verify_cache(url)
        else:
            assert file in {problem.file for problem in verify_cache(url)}


@pytest.mark.parametrize("file", [MANIFEST, f"layer_1/clean/{ROOT}"])
def test_a_damaged_document_is_named_with_what_to_do(tmp_path, file):
    pytest.importorskip("obstore")
    url = f"file://{make_cache(tmp_path / 'cache.zarr', make_plan())}"
    for damaged in (b"", b'{"zarr_format"', b"[]\n"):
        (tmp_path / "cache.zarr" / file).write_bytes(damaged)
        with pytest.raises(CacheDamaged, match=re.escape(f"; delete {url}/{file} and run the same harvest, which")):
            opened(url, tmp_path / "copies")


def test_a_decision_of_a_terabyte_is_refused_by_name(tmp_path):
    pytest.importorskip("obstore")
    folder = make_cache(tmp_path / "cache.zarr", make_plan(), shards=range(1), finalize=False)
    root, file = place_of(f"file://{folder}", IMPATIENT), f"{UPLOADS}/000001.json"
    assert isinstance(root, StorePath)
    (folder / UPLOADS).mkdir()
    with (folder / file).open("wb") as large:
        large.truncate(2**40)
    with bounded(), pytest.raises(CacheDamaged, match=refusal(str(root), file)):
        settle(root, make_plan(), 1)


def test_a_manifest_may_be_larger_than_other_documents_by_the_records_that_it_repeats(tmp_path, monkeypatch):
    pytest.importorskip("obstore")
    folder = make_cache(tmp_path / "cache.zarr", make_plan(n_rows=1500))
    url, n_bytes = f"file://{folder}", (folder / MANIFEST).stat().st_size
    monkeypatch.setattr(state, "MOST_BYTES", n_bytes // 2)
    assert opened(url, tmp_path / "copies").status == "complete"
    assert verify_cache(url) == []
    for record in range(20):
        (folder / record_file(record)).unlink()
    with pytest.raises(CacheError, match=re.escape(f"{url}/{MANIFEST} has {n_bytes:,} bytes")):
        opened(url, tmp_path / "copies")


def test_an_array_of_the_planner_comes_whole_or_not_at_all_and_within_the_bytes_of_copies(
    store_url, proxy: Proxy, tmp_path
):
    planned = with_planner_files(tmp_path / "planned")
    files = list(planner_files(ActivationCache.open(planned).plan))
    store = open_store(store_url, IMPATIENT)
    for path in sorted(path for path in planned.rglob("*") if path.is_file()):
        store.put(path.relative_to(planned).as_posix(), path.read_bytes())
    cache = opened(store_url, tmp_path / "copies")
    proxy.fail("corrupt", match="windows.npy", times=2)
    cache.files.gather(files)
    assert proxy.n_failed == 2
    assert [(cache.path / file).read_bytes() for file in files] == [(planned / file).read_bytes() for file in files]
    with pytest.raises(RoomTooSmall, match=r"--cache-bytes 300 is too little: .*window.*\.npy has 368 bytes"):
        opened(store_url, tmp_path / "small", 300).files.gather(files)
    proxy.fail("corrupt", match="window_docs.npy", times=1000)
    with pytest.raises(CacheDamaged, match=f"{store_url}/_granary/window_docs.npy fails its checksum, 3 times"):
        opened(store_url, tmp_path / "other").files.gather(files)
    assert not list((tmp_path / "other").glob("*/_granary/*window_docs*"))
