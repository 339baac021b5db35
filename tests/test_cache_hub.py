"""Caches on the hub: the same bytes arrive, nothing cut off looks complete, and refusals are sentences."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cache_fixtures import make_cache, make_plan
from hub_store import HubStore, Repo, serving
from huggingface_hub import constants

import cache_spec.push
from cache_spec import (
    ActivationCache,
    CacheConflict,
    CacheDamaged,
    CacheIncomplete,
    CacheNotFound,
    UserError,
    transcode,
)
from cache_spec.__main__ import app
from cache_spec.hub import HubError, Repository, explained
from cache_spec.layout import MANIFEST, PLAN, ROOT, record_file, shard_files
from cache_spec.markdown import front_matter, plain, table
from cache_spec.pull import plan_pull, pull_cache
from cache_spec.push import bytes_to_push, plan_push, push_cache
from cache_spec.verify import verify_cache

# what huggingface_hub does where hf_xet is off, as it is here: a stand-in of that protocol would be a storage service
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAMED = Repository(name="owner/name", kind="dataset")
KEY = ("datasets", "owner/name")


@pytest.fixture
def store():
    store = HubStore()
    with serving(store):
        yield store


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache.zarr", make_plan())


def push(path, **options) -> int:
    return push_cache(plan_push(path, NAMED), NAMED, **{"private": False, **options})


def pull(out, revision=None) -> int:
    return pull_cache(plan_pull(NAMED, revision), out)


def contents(folder: Path) -> dict[str, bytes]:
    lock = "_granary/lock"
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name != lock}


def command(*words: object) -> None:
    app(list(map(str, words)), standalone_mode=False)


@pytest.mark.parametrize("archive", [False, True])
def test_what_was_pushed_arrives_byte_for_byte(cache, store, tmp_path, archive):
    if archive:
        transcode(cache, tmp_path / "archive.zarr")
        cache = tmp_path / "archive.zarr"
    told: list[int] = []
    plan = plan_push(cache, NAMED)
    assert push_cache(plan, NAMED, private=False, advance=told.append) == 3
    assert sum(told) == bytes_to_push(plan)
    assert pull(tmp_path / "pulled.zarr") == 3
    assert contents(tmp_path / "pulled.zarr") == contents(cache)
    assert verify_cache(tmp_path / "pulled.zarr") == []
    assert set(store.repos[KEY].files) == {".gitattributes", "README.md", *contents(cache)}


def test_what_is_there_is_neither_sent_nor_fetched_again(cache, store, tmp_path):
    push(cache)
    n_commits = len(store.repos[KEY].commits)
    assert push(cache) == 0
    assert len(store.repos[KEY].commits) == n_commits
    pull(tmp_path / "pulled.zarr")
    asked = len(store.requests)
    assert pull(tmp_path / "pulled.zarr") == 0
    assert not [line for line in store.requests[asked:] if "/c/" in line]


def test_each_commit_holds_whole_shards_and_the_last_one_the_root(cache, store, monkeypatch):
    monkeypatch.setattr(cache_spec.push, "_COMMIT_BYTES", 1)
    push(cache)
    plan, commits = make_plan(), store.repos[KEY].commits
    assert len(commits) == 5
    assert PLAN in commits[0]
    for shard, names in enumerate(commits[1:-1]):
        assert set(names) == {*shard_files(plan, shard), record_file(shard)}
    assert set(commits[-1]) == {MANIFEST, ROOT}


def test_a_push_that_was_cut_off_is_no_cache_and_goes_on(cache, store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_spec.push, "_COMMIT_BYTES", 1)
    store.fate = lambda method, path, n: 403 if "/commit/" in path and len(store.repos[KEY].commits) == 3 else None
    with pytest.raises(HubError, match="forbids it"):
        push(cache)
    with pytest.raises(CacheIncomplete, match="run the push again"):
        plan_pull(NAMED)
    store.fate = lambda *_: None
    assert push(cache) == 1
    assert pull(tmp_path / "pulled.zarr") == 3
    assert contents(tmp_path / "pulled.zarr") == contents(cache)


def test_a_pull_that_was_cut_off_is_no_cache_and_goes_on(cache, store, tmp_path):
    push(cache)
    out = tmp_path / "pulled.zarr"
    store.fate = lambda method, path, n: 403 if path.endswith("layer_1/masked/c/1/0") else None
    with pytest.raises(HubError):
        pull(out)
    with pytest.raises(CacheIncomplete):
        ActivationCache.open(out)
    store.fate = lambda *_: None
    asked = len(store.requests)
    assert pull(out) == 2
    assert contents(out) == contents(cache)
    assert not [line for line in store.requests[asked:] if "/clean/c/0/0" in line]  # of a whole shard


def test_a_pull_that_is_killed_is_no_cache_and_goes_on(cache, store, tmp_path):
    push(cache)
    out, reached, released = tmp_path / "pulled.zarr", threading.Event(), threading.Event()

    def fate(method, path, n):
        if path.endswith("layer_1/clean/c/2/0") and method == "GET":
            reached.set()
            released.wait(20)

    store.fate = fate
    environment = os.environ | {"HF_ENDPOINT": store.address, "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cache_spec", "pull", "owner/name", str(out)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    assert reached.wait(20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    released.set()
    with pytest.raises(CacheIncomplete):
        ActivationCache.open(out)
    assert ActivationCache.open(out, allow_partial=True).shards == (0, 1)
    store.fate = lambda *_: None
    assert pull(out) == 1
    assert contents(out) == contents(cache)


def test_a_file_that_arrives_damaged_is_not_taken_in_and_is_fetched_again(cache, store, tmp_path):
    push(cache)
    out, files, name = tmp_path / "pulled.zarr", store.repos[KEY].files, "layer_1/clean/c/1/0"
    good = files[name]
    files[name] = good[:40] + bytes([good[40] ^ 1]) + good[41:]
    with pytest.raises(CacheDamaged, match=rf"{name} of 'owner/name' fails its checksum .* on arrival; run the same"):
        pull(out)
    assert not (out / name).exists()
    with pytest.raises(CacheIncomplete):
        ActivationCache.open(out)
    files[name] = good
    assert pull(out) == 2
    assert verify_cache(out) == []


def test_a_damaged_or_unfinished_cache_is_not_pushed(cache, store, tmp_path):
    file = cache / "layer_1/masked/c/1/0"
    data = file.read_bytes()
    file.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    with pytest.raises(CacheDamaged, match="mend the cache"):
        push(cache)
    assert ROOT not in store.repos[KEY].files
    unfinished = make_cache(tmp_path / "unfinished.zarr", make_plan(), shards=range(2), finalize=False)
    with pytest.raises(CacheIncomplete):
        plan_push(unfinished, NAMED)


def test_a_repository_of_something_else_is_left_alone(cache, store, tmp_path):
    store.repos[KEY] = Repo(files={".gitattributes": b"", "novel.txt": b"x"})
    with pytest.raises(CacheConflict, match=r"holds 'novel.txt'"):
        push(cache)
    with pytest.raises(CacheNotFound, match="is no activation cache"):
        plan_pull(NAMED)
    store.repos[KEY] = Repo()
    push(make_cache(tmp_path / "other.zarr", make_plan(seed=1)))
    with pytest.raises(CacheConflict, match="something else than"):
        push(cache)


def test_an_archive_does_not_go_where_its_cache_is(cache, store, tmp_path):
    push(cache)
    before = dict(store.repos[KEY].files)
    transcode(cache, tmp_path / "archive.zarr")
    with pytest.raises(CacheConflict, match="something else than"):
        push(tmp_path / "archive.zarr")
    assert store.repos[KEY].files == before


def test_a_folder_of_something_else_is_left_alone(cache, store, tmp_path):
    push(cache)
    out = tmp_path / "out"
    out.mkdir()
    (out / "novel.txt").write_text("x")
    with pytest.raises(CacheConflict):
        pull(out)
    assert [entry.name for entry in out.iterdir()] == ["novel.txt"]
    with pytest.raises(CacheConflict, match="holds another cache"):
        pull(make_cache(tmp_path / "other.zarr", make_plan(seed=1)))


def test_a_private_push_is_hidden_and_never_goes_where_all_can_see(cache, store, monkeypatch):
    push(cache, private=True)
    assert store.repos[KEY].private
    monkeypatch.setenv("HF_TOKEN", "hf_others")
    with pytest.raises(HubError, match="hides it from you"):
        plan_pull(NAMED)
    monkeypatch.setenv("HF_TOKEN", "hf_owners")
    store.repos[KEY].private = False
    with pytest.raises(UserError, match="is there and public"):
        push(cache, private=True)


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_others", r"\(403\): 'owner/name' is not yours"), ("hf_nobodys", r"\(401\); `hf auth login`")],
)
@pytest.mark.parametrize("there", [True, False])
def test_who_may_not_write_is_told_so(cache, store, monkeypatch, token, said, there):
    if there:
        store.repos[KEY] = Repo()
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=said) as caught:
        push(cache)
    assert token not in str(caught.value)


def test_without_a_login_nothing_is_asked(cache, store, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="needs a login"):
        push(cache)
    assert store.requests == []


def test_without_a_network_both_say_so(cache, store, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        for action in (lambda: push(cache), lambda: pull(tmp_path / "out")):
            with pytest.raises(HubError, match="did not answer"):
                action()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "owner/", "/name", "owner/na me", "owner/a--b", "../x", "owner/x.git"]
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match="give owner/name"):
        Repository(name=name, kind="model")


def test_a_dry_run_names_every_file_and_asks_the_hub_nothing(cache, store, capsys):
    command("push", cache, "--repo", "owner/name", "--dry-run")
    shown = capsys.readouterr().out
    for name, data in contents(cache).items():
        assert f"{len(data):>15,}  {name}\n" in shown
    assert "python -m cache_spec pull owner/name cache.zarr" in shown
    assert "nothing was sent" in shown
    assert store.requests == []


def test_the_commands_end_in_a_sentence_and_keep_the_token_to_themselves(cache, store, tmp_path, capsys):
    command("push", cache, "--repo", "owner/name")
    command("pull", "owner/name", tmp_path / "pulled.zarr")
    shown = capsys.readouterr()
    assert "3 of 3 shards were sent" in shown.out
    assert "3 of 3 shards were fetched, every checksum matched" in shown.out
    everything = [*store.repos[KEY].files.values(), *contents(tmp_path).values(), (shown.out + shown.err).encode()]
    assert not [data for data in everything if b"hf_owners" in data]


def test_no_path_of_this_machine_is_pushed(cache, store, tmp_path):
    push(cache)
    assert not [name for name, data in store.repos[KEY].files.items() if str(tmp_path).encode() in data]


def test_text_of_a_card_stays_text():
    nasty = "a|b](http://x) <script>\n# `c` **d**"
    shown = plain(nasty)
    assert "\n" not in shown
    for mark in "|[]()<>`*#":
        assert mark not in shown.replace(f"\\{mark}", "")
    assert table(["what"], [[nasty]]).count("\n") == 2
    assert front_matter({"tags": ["---\nlicense: x"]}).count("\n") == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("Consistency check failed: file should be of size 9\nmore"), "broke off .Consistency .* of size 9.;"),
        (RuntimeError("Error while uploading"), "broke off"),
        (OSError(errno.ENOSPC, "full"), None),
    ],
)
def test_a_transfer_that_breaks_off_is_the_hubs_and_a_full_disk_is_not(error, said):
    with pytest.raises(HubError if said else OSError, match=said), explained(NAMED):
        raise error


def test_a_repository_of_damaged_documents_is_no_cache(cache, store):
    push(cache)
    files = store.repos[KEY].files
    whole = dict(files)
    files[PLAN] = whole[PLAN][:-20]
    with pytest.raises(CacheDamaged):
        plan_pull(NAMED)
    files |= whole
    del files[record_file(1)]
    with pytest.raises(CacheIncomplete, match="run the push again"):
        plan_pull(NAMED)
