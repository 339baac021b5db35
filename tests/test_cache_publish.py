"""Writing a cache into a store: whoever writes, and whenever they are stopped, a committed shard is whole."""

import re
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_fixtures import make_plan, make_shard
from store_fixtures import BUCKET, IMPATIENT, Proxy

from cache_spec import CacheConflict, CacheDamaged, CacheIncomplete, CacheNotFound, verify_cache, write_shard
from cache_spec.create import create_cache, finalize_cache
from cache_spec.errors import StoreError
from cache_spec.files import readable_json, seal
from cache_spec.layout import PLAN, ROOT, UPLOADS, record_file, shard_files
from cache_spec.publish import create_in_store, publish_shard, remove_uploads, settle_all
from cache_spec.state import committed_shards, read_plan, recorded_shards
from cache_spec.store import Store
from cache_spec.store_path import StorePath, place_of
from cache_spec.verify import DAMAGED, LEFTOVER

TINY = make_plan(n_rows=40, n_train_rows=32, shard_rows=32)  # two shards


class Killed(Exception):
    """The end of a process, as far as a store can tell."""


@pytest.fixture
def root(store_url) -> StorePath:
    found = place_of(store_url, IMPATIENT)
    assert isinstance(found, StorePath)
    return found


def built(folder: Path, plan, shard: int, *, other: bool = False) -> Path:
    """A folder that holds one shard; with `other`, with the numbers of another kind of device."""
    create_cache(folder, plan)
    activations, columns = make_shard(plan, shard)
    if other:
        activations = {name: np.nextafter(rows, np.float16(0)) for name, rows in activations.items()}
    write_shard(folder, plan, shard, activations, columns)
    return folder


def make_in_store(root: StorePath, plan, folder: Path) -> None:
    create_in_store(root, plan, folder)
    for shard in range(plan.n_shards):
        publish_shard(root, plan, shard, built(folder / str(shard), plan, shard))
    finalize_cache(root)


def test_a_cache_put_into_a_store_is_whole_and_opens_in_plain_zarr(root, tmp_path, monkeypatch):
    plan = make_plan()
    make_in_store(root, plan, tmp_path)
    assert verify_cache(root) == verify_cache(str(root)) == []
    assert committed_shards(root, plan) == (0, 1, 2)
    obstore = pytest.importorskip("obstore.store")
    prefix = str(root).removeprefix(f"s3://{BUCKET}/")
    opened = zarr.open_group(
        zarr.storage.ObjectStore(
            obstore.S3Store(BUCKET, prefix=prefix, client_options={"allow_http": True}), read_only=True
        ),
        mode="r",
    )
    for variant in ("clean", "masked"):
        rows = np.concatenate([make_shard(plan, shard)[0]["layer_1", variant] for shard in range(3)])
        np.testing.assert_array_equal(np.asarray(opened[f"layer_1/{variant}"]), rows)
    assert opened.attrs["granary"]["status"] == "complete"  # pyright: ignore
    assert opened.metadata.consolidated_metadata is not None


def test_a_store_holds_the_bytes_that_a_folder_does(folder_root, tmp_path):
    plan = make_plan()
    make_in_store(folder_root, plan, tmp_path / "work")
    plain = tmp_path / "plain"
    create_cache(plain, plan)
    for shard in range(plan.n_shards):
        write_shard(plain, plan, shard, *make_shard(plan, shard))
    finalize_cache(plain)
    files = {path.relative_to(plain).as_posix(): path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    files.pop("_granary/lock", None)
    assert {file: folder_root.store.read(file) for file in folder_root.files()} == files


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_shard_whose_writers_are_killed_at_any_request_ends_whole(folder_root, tmp_path, monkeypatch, after):
    """The first writer dies at its n-th request, before or after it took effect. Another one, with other numbers,
    dies at its next but one; a third goes through."""
    plan, ask = TINY, Store._ask
    create_in_store(folder_root, plan, tmp_path)
    mine, others = built(tmp_path / "mine", plan, 0), built(tmp_path / "others", plan, 0, other=True)
    pure = {folder: (folder / "layer_1/clean/c/0/0").read_bytes() for folder in (mine, others)}
    assert len(set(pure.values())) == 2
    won = set()
    for n in count(int(after), 5):
        with monkeypatch.context() as patch:
            finished = die(patch, ask, n, after, lambda: publish_shard(folder_root, plan, 0, mine))
            die(patch, ask, n + 2, not after, lambda: publish_shard(folder_root, plan, 0, others))
        publish_shard(folder_root, plan, 0, others)
        assert [p for p in verify_cache(folder_root) if p.kind == DAMAGED] == []
        assert recorded_shards(folder_root) == [0]
        won.add(folder_root.store.read("layer_1/clean/c/0/0"))
        remove_uploads(folder_root)
        for file in [*shard_files(plan, 0), record_file(0)]:
            folder_root.store.delete(file)
        if finished:
            break
    assert n > 50
    assert won == set(pure.values()), "each of them won at times"


def die(patch: pytest.MonkeyPatch, ask, n: int, after: bool, work) -> bool:
    """Do the work, but die at the n-th request; whether it came to its end."""
    number, lock = count(), threading.Lock()

    def dying(self, *given, **named):
        with lock:
            left = n - next(number)
        if left < 0 or (left == 0 and not after):
            raise Killed
        answer = ask(self, *given, **named)
        if left == 0:
            raise Killed
        return answer

    patch.setattr(Store, "_ask", dying)
    try:
        work()
    except Killed:
        return False
    finally:
        patch.setattr(Store, "_ask", ask)
    return True


def test_writers_at_once_with_other_numbers_leave_one_whole_shard(root, tmp_path):
    plan = TINY
    create_in_store(root, plan, tmp_path)
    folders = [built(tmp_path / str(i), plan, 0, other=bool(i % 2)) for i in range(4)]
    records, start = {}, threading.Barrier(4)

    def write(i: int) -> None:
        start.wait()
        records[i] = publish_shard(StorePath(root.store), plan, 0, folders[i])

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 4
    assert all(record == records[0] for record in records.values()), "all are told of the one that counts"
    assert [p for p in verify_cache(root) if p.kind == DAMAGED] == []
    assert root.store.list(UPLOADS) == []


def test_a_faulty_network_does_not_show_in_the_cache(root, store_url, proxy: Proxy, tmp_path):
    root = place_of(store_url, replace(IMPATIENT, n_tries=20))  # through the proxy
    assert isinstance(root, StorePath)
    create_in_store(root, TINY, tmp_path)
    for kind in ("drop", "lost", "status", "truncate", "slow"):
        proxy.fail(kind, times=6, match="layer_1", seconds=0.01)
        proxy.fail(kind, times=2, match="_granary", seconds=0.01)
    for shard in range(2):
        publish_shard(root, TINY, shard, built(tmp_path / str(shard), TINY, shard))
    proxy.faults.clear()
    finalize_cache(root)
    assert proxy.n_failed > 20
    assert verify_cache(root) == []


@pytest.mark.parametrize("step", [f"{UPLOADS}/000000.json", record_file(0)], ids=["decision", "record"])
def test_a_store_that_is_busy_at_a_key_for_a_moment_does_not_lose_the_shard(
    root, store_url, proxy: Proxy, tmp_path, step
):
    root = place_of(store_url, IMPATIENT)  # through the proxy
    assert isinstance(root, StorePath)
    create_in_store(root, TINY, tmp_path)
    proxy.fail("status", match=f"PUT /{BUCKET}/{root.store.url.partition(f'{BUCKET}/')[2]}/{step}", status=409)
    publish_shard(root, TINY, 0, built(tmp_path / "mine", TINY, 0))
    assert proxy.n_failed == 1
    assert recorded_shards(root) == [0]
    assert [p for p in verify_cache(root) if p.kind == DAMAGED] == []


def test_what_was_put_aside_stays_until_the_record_is_seen(folder_root, tmp_path, monkeypatch):
    create_in_store(folder_root, TINY, tmp_path)
    mine, create = built(tmp_path / "mine", TINY, 0), Store.create

    def lying(store: Store, key: str, data: bytes) -> bool:
        return create(store, key, data) if key != record_file(0) else False

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", lying)
        with pytest.raises(StoreError, match=r"shards/000000.json is not there after it was put"):
            publish_shard(folder_root, TINY, 0, mine)
    assert settle_all(folder_root, TINY) == [0]
    assert recorded_shards(folder_root) == [0]
    assert [p for p in verify_cache(folder_root) if p.kind == DAMAGED] == []


def test_several_processes_create_one_cache(root, tmp_path):
    errors = []

    def create() -> None:
        try:
            create_in_store(root, TINY, tmp_path)
        except Exception as error:  # noqa: BLE001 handed to the test
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert read_plan(root) == TINY
    with pytest.raises(CacheConflict, match=re.escape(f"{root} holds a cache of another plan (seed is 0 there")):
        create_in_store(root, make_plan(n_rows=40, n_train_rows=32, shard_rows=32, seed=1), tmp_path)


def test_what_is_no_cache_is_not_written_into(folder_root, tmp_path):
    folder_root.store.put("thesis.tex", b"years of work")
    with pytest.raises(CacheConflict, match=r"holds 'thesis.tex'"):
        create_in_store(folder_root, TINY, tmp_path)
    assert folder_root.files() == ["thesis.tex"]


def test_a_half_created_cache_is_gone_on_with_or_refused(folder_root, tmp_path):
    create_in_store(folder_root, TINY, tmp_path)
    folder_root.store.delete(PLAN)
    with pytest.raises(CacheIncomplete, match="same harvest again"):
        read_plan(folder_root)
    with pytest.raises(CacheConflict, match="half-created"):
        create_in_store(folder_root, make_plan(), tmp_path)
    create_in_store(folder_root, TINY, tmp_path)
    assert read_plan(folder_root) == TINY
    for document in (ROOT, f"layer_1/{ROOT}"):  # somebody deleted them, for they were damaged
        folder_root.store.delete(document)
    create_in_store(folder_root, TINY, tmp_path)
    assert {p.kind for p in verify_cache(folder_root)} == {"unfinished"}


def test_a_killed_writers_shard_is_finished_without_its_bytes(folder_root, tmp_path, monkeypatch):
    create_in_store(folder_root, TINY, tmp_path)
    mine = built(tmp_path / "mine", TINY, 1)

    def killed(*_) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Store, "copy", killed)
        with pytest.raises(Killed):
            publish_shard(folder_root, TINY, 1, mine)
    assert recorded_shards(folder_root) == []
    assert settle_all(folder_root, TINY) == [1]
    assert recorded_shards(folder_root) == [1]
    assert settle_all(folder_root, TINY) == []
    assert {p.kind for p in verify_cache(folder_root)} == {"unfinished"}


def test_all_that_was_chosen_is_finished_and_what_is_no_choice_is_left(folder_root, tmp_path, monkeypatch):
    create_in_store(folder_root, TINY, tmp_path)

    def killed(*_) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Store, "copy", killed)
        for shard in range(TINY.n_shards):
            with pytest.raises(Killed):
                publish_shard(folder_root, TINY, shard, built(tmp_path / str(shard), TINY, shard))
    others = [f"{UPLOADS}/{name}" for name in (f"{TINY.n_shards:06d}.json", "notes.json", "-1.json", "000000/x/0.txt")]
    for key in others:
        folder_root.store.put(key, b"not ours")
    assert settle_all(folder_root, TINY) == list(range(TINY.n_shards))
    assert recorded_shards(folder_root) == list(range(TINY.n_shards))
    assert folder_root.store.list(UPLOADS) == sorted(others)


def test_damage_in_a_store_is_named(folder_root, tmp_path):
    make_in_store(folder_root, TINY, tmp_path)
    file, store = "layer_1/masked/c/0/0", folder_root.store
    data = bytearray(store.read(file))
    data[7] ^= 1
    store.put(file, bytes(data))
    store.delete("rows/pos/c/1")
    store.put("notes.txt", b"mine")
    found = {problem.file: (problem.kind, problem.what) for problem in verify_cache(folder_root)}
    assert found.pop(file) == (DAMAGED, "fails its checksum in rows 0 to 15")
    assert found.pop("rows/pos/c/1") == (DAMAGED, "is missing")
    assert found == {"notes.txt": (LEFTOVER, "belongs to no committed shard")}
    with pytest.raises(CacheDamaged, match=re.escape(f"{folder_root}/rows/pos/c/1 is missing")):
        committed_shards(folder_root, TINY)


def test_a_decision_of_another_hand_is_refused(folder_root, tmp_path):
    create_in_store(folder_root, TINY, tmp_path)
    store, record = folder_root.store, built(tmp_path / "mine", TINY, 0) / record_file(0)
    delete = re.escape(f"delete {folder_root}/{UPLOADS}/000000.json and run the same harvest again")
    for attempt in ("../../elsewhere", 7):
        facts = {"cache_id": TINY.cache_id, "shard": 0, "attempt": attempt, "record": record.read_text()}
        store.put(f"{UPLOADS}/000000.json", readable_json(seal(facts)))
        with pytest.raises(CacheDamaged, match=rf"000000.json is not of this cache; {delete}"):
            settle_all(folder_root, TINY)
    facts = {"cache_id": TINY.cache_id, "shard": 0, "attempt": "0", "record": {}}
    for damaged in (b"{}", b"{}\n", b'{"a', readable_json(seal(facts))):
        store.put(f"{UPLOADS}/000000.json", damaged)
        with pytest.raises(CacheDamaged, match=rf"000000.json .*; {delete}"):
            settle_all(folder_root, TINY)


def test_a_place_without_a_cache_says_so(root, folder_root):
    for place in (root, folder_root):
        with pytest.raises(CacheNotFound, match=re.escape(str(place))):
            read_plan(place)
        place.store.put("x", b"")
        with pytest.raises(CacheNotFound, match="no activation cache"):
            verify_cache(place)


def test_an_object_opens_as_the_file_it_is(folder_root, monkeypatch):
    monkeypatch.setattr("cache_spec.store_path._PIECE_BYTES", 1000)
    data = np.random.default_rng(0).bytes(10_500)
    folder_root.store.put("a/b", data)
    with (folder_root / "a" / "b").open() as file:
        assert file.read(10) == data[:10]
        assert file.seek(0, 2) == 10_500
        file.seek(4_321)
        assert file.read(3_000) == data[4_321:7_321]
        assert file.read() == data[7_321:]
        file.seek(0)
        assert file.read() == data
    assert not (folder_root / "a" / "c").exists()
    assert (folder_root / "a").exists()
    assert (folder_root / ROOT).name == ROOT
    with pytest.raises(FileNotFoundError):
        (folder_root / "a" / "c").open()
