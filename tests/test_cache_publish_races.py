"""Writers of one shard that meet at a given request: the files that lie there are those that the record vouches for."""

import dataclasses
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from test_cache_publish import TINY, Killed, built, die
from test_cache_truncated import with_planner_files

from cache_spec import ActivationCache, CacheConflict, verify_cache
from cache_spec.errors import StoreError
from cache_spec.layout import PLAN, UPLOADS, planner_files, record_file, shard_files
from cache_spec.publish import create_in_store, publish_shard, settle, settle_all
from cache_spec.state import recorded_shards
from cache_spec.store import Store
from cache_spec.store_path import StorePath
from cache_spec.verify import DAMAGED


@pytest.fixture
def writers(folder_root, tmp_path) -> tuple[Path, Path]:
    """Two folders with the first shard of a cache that is made in `folder_root`, whose numbers differ."""
    create_in_store(folder_root, TINY, tmp_path)
    return built(tmp_path / "one", TINY, 0), built(tmp_path / "other", TINY, 0, other=True)


def holds_the_files_of(root: StorePath, folder: Path) -> bool:
    return all(root.store.read(file) == (folder / file).read_bytes() for file in shard_files(TINY, 0))


def before(patch: pytest.MonkeyPatch, wanted: Callable[[str, bool], bool], work: Callable[[], object]) -> None:
    """Do the work just before the first request whose key, and whether it writes, are `wanted`."""
    ask, done = Store._ask, []

    def asking(self, key, request, *, writing=False):
        if not done and wanted(key, writing):
            done.append(key)
            work()
        return ask(self, key, request, writing=writing)

    patch.setattr(Store, "_ask", asking)


def test_a_writer_that_is_overtaken_while_it_uploads_changes_nothing(folder_root, writers, monkeypatch):
    fast, slow = writers
    before(monkeypatch, lambda key, writing: writing, lambda: publish_shard(folder_root, TINY, 0, fast))
    publish_shard(folder_root, TINY, 0, slow)
    assert holds_the_files_of(folder_root, fast)
    assert folder_root.store.list(UPLOADS) == []


def test_a_writer_that_was_chosen_is_the_one_that_counts_though_it_died(folder_root, writers, monkeypatch):
    dead, other = writers

    def killed(*_) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Store, "copy", killed)
        with pytest.raises(Killed):
            publish_shard(folder_root, TINY, 0, dead)
    publish_shard(folder_root, TINY, 0, other)
    assert holds_the_files_of(folder_root, dead)
    assert folder_root.store.list(UPLOADS) == []


def test_one_that_sleeps_before_the_record_does_not_put_it_over_a_later_one(folder_root, writers, monkeypatch):
    """Meanwhile another finished its shard, somebody deleted the record, and a third made the shard again."""
    sleeping, later = writers

    def meanwhile() -> None:
        settle(folder_root, TINY, 0)
        folder_root.store.delete(record_file(0))
        publish_shard(folder_root, TINY, 0, later)

    before(monkeypatch, lambda key, writing: writing and key == record_file(0), meanwhile)
    publish_shard(folder_root, TINY, 0, sleeping)
    assert holds_the_files_of(folder_root, later)
    assert [p for p in verify_cache(folder_root) if p.kind == DAMAGED] == []


def test_a_file_that_is_cut_on_its_way_within_the_store_is_not_committed(folder_root, writers, monkeypatch):
    copy, file = Store.copy, "layer_1/clean/c/0/0"

    def cut(store: Store, source: str, target: str) -> None:
        copy(store, source, target)
        if target == file:
            store.put(target, store.read(target)[:-1])

    with monkeypatch.context() as patch:
        patch.setattr(Store, "copy", cut)
        with pytest.raises(StoreError, match=rf"{file} has \d+ bytes instead of .*again"):
            publish_shard(folder_root, TINY, 0, writers[0])
    assert recorded_shards(folder_root) == []
    assert settle_all(folder_root, TINY) == [0]
    assert holds_the_files_of(folder_root, writers[0])


def test_a_file_that_is_cut_on_its_way_to_the_store_is_not_taken(folder_root, tmp_path, monkeypatch):
    obstore = pytest.importorskip("obstore")
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, key, path, **how: put(store, key, path.read_bytes()[:-1]))
    (tmp_path / "file").write_bytes(b"0123456789")
    with pytest.raises(StoreError, match="a/b has 9 bytes after 10 were sent"):
        folder_root.store.put_file("a/b", tmp_path / "file")


def test_a_cache_has_its_plan_when_it_has_all_else(folder_root, tmp_path, monkeypatch):
    """Its creator is killed at any request."""
    planned = with_planner_files(tmp_path / "planned")
    plan, ask = ActivationCache.open(planned).plan, Store._ask
    assert len(planner_files(plan)) == 2
    for n in count():
        finished = die(monkeypatch, ask, n, True, lambda: create_in_store(folder_root, plan, planned))
        there = set(folder_root.files())
        assert PLAN not in there or there >= set(planner_files(plan))
        for file in there:
            folder_root.store.delete(file)
        if finished:
            break
    assert PLAN in there
    assert n > 10


def test_a_plan_that_came_first_is_not_put_over(folder_root, tmp_path, monkeypatch):
    other = dataclasses.replace(TINY, seed=1)
    before(monkeypatch, lambda key, writing: writing, lambda: create_in_store(folder_root, other, tmp_path))
    with pytest.raises(CacheConflict):
        create_in_store(folder_root, TINY, tmp_path)
