"""A harvest into an object store: the cache that a folder would hold, and nothing left on this disk."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harvest_fixtures import request_for, save_model, write_text
from pipeline_fixtures import files_of
from store_fixtures import IMPATIENT, Proxy

from cache_spec import CacheConflict, DiskFull, StoreError, UserError, verify_cache
from cache_spec.layout import LOCK, UPLOADS, record_file
from cache_spec.publish import publish_shard
from cache_spec.state import read_root, recorded_shards
from cache_spec.store import Store
from cache_spec.store_path import StorePath, place_of
from harvest import forecast, run, target
from harvest.model import load_model
from harvest.share import Share

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_model(str(model_folder))


@pytest.fixture(scope="module")
def plain(loaded, text, tmp_path_factory):
    """The same cache in a folder."""
    out = tmp_path_factory.mktemp("plain") / "cache"
    run.harvest(loaded, request_for(loaded, text), out)
    return out


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """No test waits as long as a user would want to."""
    monkeypatch.setattr(run, "open_target", lambda out, scratch: target.open_target(out, scratch, IMPATIENT))


@pytest.fixture
def scratch(tmp_path):
    return tmp_path / "scratch"


@pytest.fixture
def folder_url(tmp_path):
    """A store that is a folder, where what counts is not how the bytes travel."""
    pytest.importorskip("obstore")
    return f"file://{tmp_path}/store"


def contents(cache: Path) -> dict[str, bytes]:
    """All files of a cache in a folder, but for the lock, which a store has none of."""
    return {name: data for name, data in files_of(cache).items() if name != LOCK}


def objects(url) -> dict[str, bytes]:
    """All that the store has there."""
    root = place_of(url, IMPATIENT)
    assert isinstance(root, StorePath)
    return {file: root.store.read(file) for file in root.files()}


def test_a_store_gets_what_a_folder_would_and_scratch_goes(loaded, text, plain, store_url, scratch, capsys):
    run.harvest(loaded, request_for(loaded, text), store_url, scratch=scratch)
    assert objects(store_url) == contents(plain)
    assert list(scratch.iterdir()) == []
    said = capsys.readouterr().out
    assert f"shards at {store_url}" in said
    assert re.search(r"disk +[\d.]+ kB to put into the store, [\d.]+ kB when whole; [\d.]+ kB needed here", said)
    assert verify_cache(store_url) == []
    run.harvest(loaded, request_for(loaded, text), store_url, scratch=scratch)
    assert "nothing left to do" in capsys.readouterr().out


def test_shares_and_a_resume_make_the_same_cache(loaded, text, plain, store_url, scratch, capsys):
    request = request_for(loaded, text)
    errors = []

    def share(index: int) -> None:
        try:
            given = Share(index=index, count=3, source="--shard")
            run.harvest(loaded, request, store_url, scratch=scratch, share=given)
        except Exception as error:  # noqa: BLE001 handed to the test
            errors.append(error)

    threads = [threading.Thread(target=share, args=(index,)) for index in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert not scratch.exists() or list(scratch.iterdir()) == []
    assert read_root(place_of(store_url))["status"] == "harvesting"
    run.harvest(loaded, request, store_url, scratch=scratch)
    assert objects(store_url) == contents(plain)


def test_through_a_faulty_network_it_is_the_same_cache(loaded, text, plain, store_url, proxy: Proxy, scratch):
    for kind in ("drop", "lost", "status", "truncate"):
        proxy.fail(kind, times=3, match="/c/")
        proxy.fail(kind, times=1, match="plan.json")
    try_until_it_is_through(lambda: run.harvest(loaded, request_for(loaded, text), store_url, scratch=scratch))
    assert proxy.n_failed >= 10
    assert objects(store_url) == contents(plain)


def try_until_it_is_through(harvest) -> None:
    """As a user would: the same command again."""
    for _ in range(5):
        try:
            harvest()
        except StoreError:
            continue
        return
    raise AssertionError("it never came through")


def test_a_store_that_goes_away_loses_no_committed_shard(loaded, text, plain, store_url, proxy: Proxy, scratch):
    request = request_for(loaded, text)
    proxy.fail("drop", match=f"{store_url.removeprefix('s3:/')}/_granary/uploads/000002", times=10**6)
    with pytest.raises(StoreError, match=r"_granary/uploads/000002.*did not come through.*run the same command again"):
        run.harvest(loaded, request, store_url, scratch=scratch)
    assert list(scratch.iterdir()) == []
    proxy.faults.clear()
    assert recorded_shards(place_of(store_url)) == [0, 1]
    run.harvest(loaded, request, store_url, scratch=scratch)
    assert objects(store_url) == contents(plain)


def test_a_shard_that_another_process_commits_first_is_let_go(loaded, text, plain, folder_url, scratch, monkeypatch):
    """A second writer whose numbers differ: the first one's stay, to the byte."""
    publish = publish_shard

    def late(root, plan, shard, folder):
        publish(root, plan, shard, plain)
        file = folder / "layer_1/clean/c" / str(shard) / "0"
        if file.exists():
            data = bytearray(file.read_bytes())
            data[0] ^= 1
            file.write_bytes(data)
        return publish(root, plan, shard, folder)

    monkeypatch.setattr(target, "publish_shard", late)
    run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    assert objects(folder_url) == contents(plain)


def test_another_plan_or_another_thing_is_refused(loaded, text, folder_url, scratch):
    run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    with pytest.raises(CacheConflict, match=re.escape(f"{folder_url} holds a cache of another plan")):
        run.harvest(loaded, request_for(loaded, text, seed=1), folder_url, scratch=scratch)
    other = place_of(f"{folder_url}/other", IMPATIENT)
    assert isinstance(other, StorePath)
    other.store.put("thesis.tex", b"")
    with pytest.raises(CacheConflict, match=r"holds 'thesis.tex'"):
        run.harvest(loaded, request_for(loaded, text), str(other), scratch=scratch)


def test_a_dry_run_writes_nothing_anywhere(loaded, text, folder_url, scratch, capsys):
    run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch, dry_run=True, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == folder_url
    assert 0 < facts["bytes"]["on_disk"] < facts["bytes"]["needed"]
    assert objects(folder_url) == {}
    assert not scratch.exists()


def test_a_bucket_that_may_not_be_written_is_found_out_before_the_planning(
    loaded, text, store_url, proxy: Proxy, scratch, monkeypatch
):
    monkeypatch.setattr(run, "make_plan", lambda *_: pytest.fail("it was planned, which can take an hour"))
    proxy.fail("status", match="PUT", status=403, times=1000)
    with pytest.raises(StoreError, match=f"the store refuses {store_url}"):
        run.harvest(loaded, request_for(loaded, text), store_url, scratch=scratch)
    assert objects(store_url) == {}
    assert not scratch.exists() or list(scratch.iterdir()) == []


def test_a_store_that_creates_over_what_is_there_is_refused(loaded, text, folder_url, scratch, monkeypatch):
    """As those do that do not know the condition of a create."""

    def put(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True

    monkeypatch.setattr(Store, "create", put)
    with pytest.raises(StoreError, match=r"over one that is there .*; use another store"):
        run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    assert objects(folder_url) == {}


def test_too_little_room_for_a_shard_is_said_first(loaded, text, folder_url, scratch, monkeypatch):
    monkeypatch.setattr(forecast, "_bytes_free", lambda _: 1000)
    with pytest.raises(DiskFull, match=r"on this disk while a shard is built and 1.00 kB are free.*--scratch"):
        run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    assert objects(folder_url) == {}


def test_scratch_folders_of_others_are_not_used(loaded, text, folder_url, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--scratch is for a cache in an object store"):
        run.harvest(loaded, request_for(loaded, text), tmp_path / "cache", scratch=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give a folder"):
        run.harvest(loaded, request_for(loaded, text), folder_url, scratch=tmp_path / "file")
    monkeypatch.setattr(target.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(target.os, "getuid", lambda: 12345)
    (tmp_path / "granary-12345").symlink_to(tmp_path)
    with pytest.raises(UserError, match="granary-12345 is not a folder of yours"):
        run.harvest(loaded, request_for(loaded, text), folder_url)


def test_what_a_killed_process_left_is_cleared_by_the_next(loaded, text, plain, folder_url, scratch):
    root = place_of(folder_url, IMPATIENT)
    assert isinstance(root, StorePath)
    run.harvest(
        loaded, request_for(loaded, text), folder_url, scratch=scratch, share=Share(index=0, count=2, source="--shard")
    )
    root.store.put(f"{UPLOADS}/000001/0123456789abcdef/layer_1/clean/c/1/0", b"half of it")
    leftover = target._scratch_folder(root, scratch)
    (leftover / "0123").mkdir(parents=True)
    (leftover / "0123" / "shard").write_bytes(b"0" * 100)
    run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    assert list(scratch.iterdir()) == []
    assert objects(folder_url) == contents(plain)


def test_a_shard_whose_writer_died_when_it_was_chosen_is_finished_and_not_made_again(
    loaded, text, plain, folder_url, scratch, monkeypatch
):
    made, publish = [], target.publish_shard

    def counting(root, plan, shard, folder):
        made.append(shard)
        return publish(root, plan, shard, folder)

    def away(self, source, to):
        raise StoreError("the store is away")

    monkeypatch.setattr(target, "publish_shard", counting)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "copy", away)
        with pytest.raises(StoreError, match="is away"):
            run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    (chosen,) = made
    run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    assert made.count(chosen) == 1
    assert objects(folder_url) == contents(plain)


def test_the_command_takes_a_url(model_folder, text, plain, store_url, tmp_path):
    arguments = ["--model", model_folder, "--dataset", text, "--layers", "1", "--tokens", "2100", "--held-out", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "harvest", *map(str, arguments), "--out", store_url, "--scratch", str(tmp_path / "s")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"at {store_url}" in done.stdout
    assert list((tmp_path / "s").iterdir()) == []
    for command, said in (("verify", f"{store_url} is whole"), ("info", f'open_cache("{store_url}")')):
        done = subprocess.run(
            [sys.executable, "-m", "cache_spec", command, store_url], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_a_shard_is_made_again_where_a_killed_process_has_left_its_claim(loaded, text, plain, folder_url, scratch):
    """Killed here, finished elsewhere, then a commit record deleted, as the message about a damaged file says."""
    run.harvest(loaded, request_for(loaded, text), folder_url)
    root = place_of(folder_url, IMPATIENT)
    assert isinstance(root, StorePath)
    claims = target._scratch_folder(root, scratch) / "claims"
    claims.mkdir(parents=True)
    (claims / "000001.0").write_bytes(b"{}\n")
    root.store.delete(record_file(1))
    run.harvest(loaded, request_for(loaded, text), folder_url, scratch=scratch)
    assert objects(folder_url) == contents(plain)
    assert list(scratch.iterdir()) == []
