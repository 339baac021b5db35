"""Object stores: what was put is read, what fails is tried again, what is refused is one sentence."""

import http.client
import re
import threading
from dataclasses import replace
from urllib.parse import quote

import pytest
from store_fixtures import IMPATIENT, Proxy, credentials

from cache_spec import store as store_module
from cache_spec.errors import CacheDamaged, ObjectMissing, StoreError, UserError
from cache_spec.store import open_store
from cache_spec.store_url import is_url
from cache_spec.untrusted import MOST_BYTES


@pytest.fixture(params=["s3", "file"])
def store(request, tmp_path):
    """The same interface over a server and over a folder."""
    url = request.getfixturevalue("store_url") if request.param == "s3" else f"file://{tmp_path}/a folder"
    return open_store(url, IMPATIENT)


def test_what_was_put_is_read(store, tmp_path):
    store.put("rows/token/c/0", b"0123456789")
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    store.put_file("layer_0/clean/c/0/0", tmp_path / "large")
    assert store.read("rows/token/c/0") == b"0123456789"
    assert store.read_range("rows/token/c/0", 3, 4) == b"3456"
    assert store.read_range("rows/token/c/0", 3, 0) == b""
    assert (store.size("layer_0/clean/c/0/0"), store.size("layer_0")) == (100_000, None)
    assert store.list() == ["layer_0/clean/c/0/0", "rows/token/c/0"]
    assert store.list("rows") == ["rows/token/c/0"]
    assert store.list("row") == store.list("elsewhere") == []
    assert store.sizes() == store.sizes(some=True) == {"layer_0/clean/c/0/0": 100_000, "rows/token/c/0": 10}
    store.copy("rows/token/c/0", "copied")
    assert store.read("copied") == b"0123456789"
    with pytest.raises(ObjectMissing, match="rows/none"):
        store.copy("rows/none", "copied")
    store.put("rows/token/c/0", b"new")
    assert store.read("rows/token/c/0") == b"new"
    store.delete("rows/token/c/0")
    store.delete("rows/token/c/0")
    assert store.size("rows/token/c/0") is None


def test_of_several_creators_one_succeeds(store):
    wrote = {}
    threads = [
        threading.Thread(target=lambda i=i: wrote.update({i: store.create("_granary/plan.json", b"by %d" % i)}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (i for i, won in wrote.items() if won)
    assert len(wrote) == 8
    assert store.read("_granary/plan.json") == b"by %d" % winner
    assert not store.create("_granary/plan.json", b"by %d" % winner), "it is there, whoever asks"


def test_a_create_that_met_another_request_is_made_again(store_url, proxy: Proxy):
    """The 409 of S3 says that somebody is at the key, not that anything is there."""
    store = open_store(store_url, IMPATIENT)
    proxy.fail("status", match="PUT", status=409, times=2)
    assert store.create("a", b"mine")
    assert store.read("a") == b"mine"
    proxy.fail("status", match="PUT", status=409)
    assert not store.create("a", b"another's"), "it is there"
    proxy.fail("status", match="PUT", status=409, times=1000)
    with pytest.raises(StoreError, match=f"{store_url}/b did not come through .409 Conflict, but nothing.*4 tries"):
        store.create("b", b"")
    assert store.size("b") is None


def test_looking_into_a_folder_that_is_not_there_makes_none(tmp_path):
    pytest.importorskip("obstore")
    store = open_store(f"file://{tmp_path}/made/by a stranger", IMPATIENT)
    assert (store.size("a"), store.list(), store.sizes(some=True)) == (None, [], {})
    store.delete("a")
    for ask in (store.read, lambda key: store.read_range(key, 0, 1), lambda key: store.copy(key, "b")):
        with pytest.raises(ObjectMissing, match=re.escape(store.url)):
            ask("a")
    assert list(tmp_path.iterdir()) == []
    assert store.create("a", b"x")
    assert (store.read("a"), store.list()) == (b"x", ["a"])


def test_what_can_be_no_folder_is_one_sentence_and_not_tried_again(tmp_path, monkeypatch):
    pytest.importorskip("obstore")
    monkeypatch.setattr(store_module.time, "sleep", lambda _: pytest.fail("it was tried again"))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for below in ("file", "file/x", "x" * 300, "folder"):
        store = open_store(f"file://{tmp_path}/{below}", IMPATIENT)
        key = "a" if below != "folder" else "y" * 300
        with pytest.raises(UserError, match=re.escape(store.url)):
            store.create(key, b"")
        if below != "file/x":  # where nothing is there
            with pytest.raises(UserError, match=re.escape(store.url)):
                store.size(key)
    (tmp_path / "folder" / "notes").write_bytes(b"")
    with pytest.raises(StoreError, match=r"the disk refuses .*folder/notes/a .Not a directory.; check the folder"):
        open_store(f"file://{tmp_path}/folder", IMPATIENT).read("notes/a")


def test_what_is_missing_and_what_is_too_short_is_named(store):
    store.put("a/b", b"0123456789")
    with pytest.raises(ObjectMissing, match=re.escape(f"{store.url}/a/c is not there")):
        store.read("a/c")
    with pytest.raises(ObjectMissing):
        store.read_range("a/c", 0, 1)
    for start in (8, 20):
        with pytest.raises(StoreError, match=re.escape(f"{store.url}/a/b")):
            store.read_range("a/b", start, 4)
    with pytest.raises(StoreError, match="no key"):
        store.read("a/../b")


def test_an_object_is_not_read_beyond_what_is_wanted(store):
    store.put("a", b"0123456789")
    assert store.read("a", 10) == b"0123456789"
    with pytest.raises(CacheDamaged, match=re.escape(f"{store.url}/a has 10 bytes, and 9 are the most")):
        store.read("a", 9)
    assert [store.read_start("a", n) for n in (0, 3, 10, 99)] == [(b"0123456789"[:n], 10) for n in (0, 3, 10, 99)]
    store.put("empty", b"")
    assert store.read("empty") == b""
    assert store.read_start("empty", 5) == (b"", 0)
    with pytest.raises(ObjectMissing, match=f"{store.url}/none"):
        store.read_start("none", 5)


def test_an_object_of_a_terabyte_is_not_read_and_not_asked_for_twice(tmp_path):
    pytest.importorskip("obstore")
    store = open_store(f"file://{tmp_path}", IMPATIENT)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CacheDamaged, match=f"large has {2**40:,} bytes, and {MOST_BYTES:,} are the most"):
        store.read("large")


@pytest.mark.parametrize("read", ["whole", "a range"])
def test_a_server_whose_answer_does_not_end_is_not_listened_to(store_url, proxy: Proxy, read):
    """Its headers tell of 200 bytes, or of those that were asked for; what comes is a gigabyte."""
    store = open_store(store_url, IMPATIENT)
    store.put("a", b"0" * 200)
    proxy.fail("endless", times=1000, n_bytes=2**30)
    with pytest.raises(StoreError, match=f"{store_url}/a did not come through .more than"):
        store.read("a") if read == "whole" else store.read_range("a", 10, 100)
    assert proxy.n_failed == IMPATIENT.n_tries
    assert proxy.faults[0].n_sent < 2**27  # what fits into the buffers of sockets


def test_a_listing_without_an_end_is_not_waited_for(store, monkeypatch):
    for i in range(4):
        store.put(f"a/{i}", b"")
    monkeypatch.setattr(store_module, "_MOST_KEYS", 3)
    with pytest.raises(CacheDamaged, match=re.escape(f"{store.url} lists more than 3 objects")):
        store.list()


def test_a_large_file_goes_in_parts(store_url, proxy: Proxy, tmp_path):
    (tmp_path / "large").write_bytes(bytes(range(256)) * 4096 * 20)
    store = open_store(store_url, IMPATIENT)
    store.put_file("large", tmp_path / "large")
    assert sum("partNumber=" in line for line in proxy.requests) == 3
    assert store.read_range("large", 10 * 2**20 + 7, 5) == bytes(range(7, 12))


@pytest.mark.parametrize("kind", ["drop", "lost", "status", "truncate", "slow"])
def test_a_store_that_fails_and_recovers_is_not_noticed(store_url, proxy: Proxy, tmp_path, kind):
    store = open_store(store_url, IMPATIENT)
    (tmp_path / "large").write_bytes(bytes(9 * 2**20))

    def failing() -> None:
        proxy.faults.clear()
        proxy.fail(kind, times=2, seconds=0.01, n_bytes=40, status=503)

    failing()
    store.put("a", b"0" * 200)
    failing()
    assert store.create("b", b"1" * 200), "ours, though the answer may have been lost"
    failing()
    assert not store.create("b", b"2" * 200)
    failing()
    store.put_file("c", tmp_path / "large")
    failing()
    assert store.read("b") == b"1" * 200
    failing()
    assert store.read_range("a", 10, 100) == b"0" * 100
    failing()
    assert store.list() == ["a", "b", "c"]
    failing()
    assert store.size("c") == 9 * 2**20
    assert proxy.n_failed >= 9


@pytest.mark.parametrize(("kind", "why"), [("drop", "sending request"), ("status", "500"), ("truncate", "")])
def test_a_store_that_stays_away_is_one_sentence(store_url, proxy: Proxy, kind, why):
    store = open_store(store_url, IMPATIENT)
    store.put("a", b"0" * 200)
    proxy.fail(kind, times=1000)
    with pytest.raises(StoreError, match=f"{store_url}/a did not come through .*{why}.*4 tries.*again") as caught:
        store.read("a")
    assert "\n" not in str(caught.value)
    assert proxy.n_failed == 4


def test_a_server_that_says_nothing_is_not_waited_for_forever(store_url, proxy: Proxy):
    store = open_store(store_url, replace(IMPATIENT, n_tries=2, stall_seconds=0.2))
    store.put("a", b"0" * 200)
    proxy.fail("slow", times=1000, seconds=1.0, n_bytes=1)
    with pytest.raises(StoreError, match="did not come through"):
        store.read("a")


@pytest.mark.parametrize(("status", "said"), [(403, "refuses"), (400, "does not take"), (301, "region")])
def test_a_refusal_is_not_tried_again_and_tells_no_secret(store_url, proxy: Proxy, status, said):
    store = open_store(store_url, IMPATIENT)
    proxy.fail("status", status=status, times=1000)
    with pytest.raises(StoreError, match=f"{said}.*AWS_") as caught:
        store.create("a", b"")
    assert proxy.n_failed == 1
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(store_url):
    store = open_store("s3://elsewhere/a", IMPATIENT)
    for ask in (lambda: store.create("a", b""), lambda: store.read("a"), lambda: store.put("a", b""), store.list):
        with pytest.raises(StoreError, match=r"there is no such bucket: s3://elsewhere/a.*check the URL"):
            ask()


@pytest.mark.parametrize("name", ["a\x1b[31mred", "x//y", "tab\tx", "x/../y"])
def test_an_object_of_a_name_that_is_none_is_named(store_url, store_server, name):
    store = open_store(store_url, IMPATIENT)
    connection = http.client.HTTPConnection(store_server.removeprefix("http://"), timeout=30)
    connection.request("PUT", f"/{quote(store_url.removeprefix('s3://') + '/' + name)}", b"")
    assert connection.getresponse().status == 200
    connection.close()
    with pytest.raises(StoreError, match=r"is an object of a name that none of a cache has.*delete that") as caught:
        store.list()
    assert name.encode("unicode_escape").decode() in str(caught.value)
    assert "AWS_" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "setting", "said"),
    [
        ("az://container/a", {}, "AZURE_STORAGE_ACCOUNT_NAME is not set"),
        (
            "az://container/a",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "%hush"},
            "AZURE_STORAGE_ACCOUNT_KEY is no key",
        ),
        ("gs://bucket/a", {"GOOGLE_SERVICE_ACCOUNT": "/nowhere/key.json"}, "GOOGLE_SERVICE_ACCOUNT names is not there"),
        ("gs://bucket/a", {"GOOGLE_SERVICE_ACCOUNT": "{}/hush.json"}, "GOOGLE_SERVICE_ACCOUNT names is no key"),
    ],
)
def test_what_the_environment_lacks_is_named(monkeypatch, tmp_path, url, setting, said):
    pytest.importorskip("obstore")
    (tmp_path / "hush.json").write_text('{"private_key": "hush"}')
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    with pytest.raises(StoreError, match=f"{url} cannot be opened: .*{said}") as caught:
        open_store(url, IMPATIENT)
    assert "hush" not in str(caught.value)


def test_an_address_where_nobody_listens_is_one_sentence(monkeypatch):
    pytest.importorskip("obstore")
    credentials(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(StoreError, match=r"did not come through .*4 tries"):
        open_store("s3://caches/a", IMPATIENT).size("a")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.com/x", "s3://"),
        ("s3://", "names no place"),
        ("s3://bucket", "names no place"),
        ("s3://bucket/a/../b", "names no place"),
        ("file://folder/a", "names no place"),
        ("file:///folder%00/a", "names no place"),
        ("s3://bucket/a\x1b[31m", "names no place"),
        ("s3://buc ket/a", "names no place"),
        ("s3://bucket:99999/a", "names no place"),
        ("s3://me:hush@bucket/a", "environment"),
        ("az://container/a?sig=hush", "environment"),
    ],
)
def test_a_url_of_no_store_is_refused(url, said):
    assert is_url(url)
    with pytest.raises(UserError, match=said) as caught:
        open_store(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        *(("s3://bucket/a", "AWS_ENDPOINT_URL", value) for value in ("", "garbage", "ftp://x", "http://", "http:///x")),
        *(
            ("s3://bucket/a", "AWS_ENDPOINT_URL", value)
            for value in ("http://a b", "http://hush@h:99999", "http://[::1")
        ),
        ("s3://bucket/a", "AWS_ENDPOINT", "garbage"),
        ("s3://bucket/a", "AWS_ENDPOINT_URL_S3", "http://ü"),
        ("s3://bucket/a", "AWS_METADATA_ENDPOINT", "garbage"),
        ("s3://bucket/a", "AWS_REGION", "us east"),
        ("s3://bucket/a", "AWS_ACCESS_KEY_ID", "hush\n"),
        ("s3://bucket/a", "AWS_SESSION_TOKEN", "hüsh"),
        ("az://container/a", "AZURE_STORAGE_ENDPOINT", "garbage"),
        ("gs://bucket/a", "GOOGLE_BASE_URL", ""),
    ],
)
def test_an_environment_that_no_request_can_be_made_of_is_refused_by_its_variable(monkeypatch, url, name, value):
    """Before obstore hears of it, which would panic."""
    credentials(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment's {name} (is no address|holds a space)") as caught:
        open_store(url, IMPATIENT).size("a")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["http://h", "https://minio.example.com:9000/below", "http://[::1]:9000", "http://a_b"]
)
def test_an_address_of_a_server_is_taken(monkeypatch, value):
    pytest.importorskip("obstore")
    credentials(monkeypatch, value)
    assert open_store("s3://bucket/a", IMPATIENT).url == "s3://bucket/a"


def test_folders_are_no_urls():
    assert not any(map(is_url, ["cache.zarr", "/data/s3/x", "./s3:/x", "C:/x", ""]))
    assert is_url("s3://bucket/x")
