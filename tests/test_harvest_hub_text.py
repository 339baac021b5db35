"""Text of the hub: pinned, told in one sentence when it cannot be read, and whole however often the stream drops."""

import io
import json
import random
import time
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_fixtures import COMMIT, Hub, served
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_spec import UserError
from harvest import hub_text
from harvest.hub_text import passes
from harvest.text import open_text


def documents(source):
    return list(open_text(source, seed=0).documents)


def http_error(kind, status):
    return kind(str(status), response=httpx.Response(status, request=httpx.Request("GET", "http://hub")))


@pytest.fixture
def waits(monkeypatch):
    """The waits, which take no time."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set in memory; returns the calls made to it."""
    calls = []
    columns = {
        "text": [{"text": f"document {i}"} for i in range(3)],
        "other": [{"body": "x"}],
        "null": [{"text": "a"}, {"text": None}],
        "pile": [
            {"text": f"{part} {i}", "meta": {"pile_set_name": part}} for i in range(3) for part in ("Pile-CC", "C")
        ],
    }

    def load(repo, config, **facts):
        calls.append((repo, config, facts))
        if config == "wrong":
            raise ValueError("BuilderConfig 'wrong' not found.\nand more")
        if config == "gated":
            raise datasets.exceptions.DatasetNotFoundError("is gated") from http_error(GatedRepoError, 401)
        rows = columns["pile" if repo.startswith("monology") else config or "text"]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(hub_text.HfApi, "dataset_info", lambda self, repo, **facts: SimpleNamespace(sha="c0ffee"))
    monkeypatch.setattr(hub_text, "load_dataset", load)
    return calls


def test_a_hub_data_set_is_streamed_at_the_commit_that_is_recorded(hub):
    text = open_text("owner/name@main", 0)
    assert (text.id, text.revision) == ("owner/name", "c0ffee")
    assert list(text.documents) == ["document 0", "document 1", "document 2"]
    assert hub == [("owner/name", None, {"split": "train", "streaming": True, "revision": "c0ffee"})]


def test_another_config_split_and_column_can_be_named(hub):
    assert documents("owner/name:other:test#body") == ["x"]
    assert hub == [("owner/name", "other", {"split": "test", "streaming": True, "revision": "c0ffee"})]


def test_the_preset_of_one_part_of_the_pile_leaves_out_the_others(hub):
    assert documents("pile-cc") == ["Pile-CC 0", "Pile-CC 1", "Pile-CC 2"]
    assert len(documents("pile")) == 6


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("other", "no column 'text', only body; name one of them as owner/name:other#body"),
        ("null", "row 2 of 'owner/name' has a 'text' that is empty"),
        ("wrong", "cannot be read: BuilderConfig 'wrong' not found.$"),
        ("gated", "is gated: accept its terms at https://huggingface.co/datasets/owner/name"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence_at_once(hub, waits, config, said):
    with pytest.raises(UserError, match=said):
        documents(f"owner/name:{config}")
    assert waits == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OfflineModeIsEnabled("offline"), "the Hugging Face hub cannot be reached"),
        (http_error(RepositoryNotFoundError, 404), "hub has no data set 'owner/name' \\(revision v1\\)"),
        (http_error(GatedRepoError, 403), "is gated"),
        (http_error(HfHubHTTPError, 418), "the Hugging Face hub answered for 'owner/name': 418"),
    ],
)
def test_a_data_set_that_is_not_found_is_not_looked_for_again(monkeypatch, waits, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub_text.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match=said):
        documents("owner/name@v1")
    assert waits == []


def test_a_hub_that_cannot_be_reached_is_tried_a_few_times(monkeypatch, waits, capsys):
    def fail(*_, **__):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(hub_text.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match="no text at 'owner/name' here, and the Hugging Face hub cannot be reached"):
        documents("owner/name")
    assert len(waits) == 3
    assert capsys.readouterr().err.count("'owner/name': no route; goes on in") == 3


PASSING = [
    *(http_error(HfHubHTTPError, status) for status in (408, 429, 500, 502, 503, 504)),
    *(kind("x") for kind in (ConnectionError, TimeoutError, httpx.ReadTimeout, httpx.ConnectError, httpx.ReadError)),
    httpx.RemoteProtocolError("peer closed connection"),
]


def caused(error, cause):
    error.__cause__ = cause
    return error


def test_what_passes_is_told_from_what_stays():
    staying = [http_error(HfHubHTTPError, status) for status in (400, 401, 403, 404, 416)]
    staying += [
        FileNotFoundError(),
        ValueError("Bad split"),
        UserError("x"),
        OfflineModeIsEnabled("x"),
        OSError(28, "x"),
    ]
    assert all(map(passes, PASSING))
    assert not any(map(passes, staying))
    assert all(passes(caused(OSError("x"), error)) for error in PASSING)
    assert not any(passes(caused(FileNotFoundError("x"), error)) for error in staying)
    assert not passes(caused(ConnectionError("x"), OfflineModeIsEnabled("x")))


def dropping(monkeypatch, shards, drops):
    """A data set of `shards` (lists of texts) whose n-th step fails if n is in `drops`, with an error that passes."""
    steps = iter(range(10**9))

    def step():
        n = next(steps)
        if n in drops:
            raise PASSING[n % len(PASSING)]

    def rows(shards):
        for shard in shards:
            step()
            for text in shard:
                step()
                yield {"text": text}
            step()

    def load(*_, **__):
        step()
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": shards})

    monkeypatch.setattr(hub_text.HfApi, "dataset_info", lambda self, repo, **facts: SimpleNamespace(sha="c0ffee"))
    monkeypatch.setattr(hub_text, "load_dataset", load)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 8), min_size=1, max_size=5), data=st.data())
def test_no_document_is_lost_or_doubled_wherever_the_stream_drops(monkeypatch, waits, sizes, data):
    shards = [[f"{i}.{j}" for j in range(size)] for i, size in enumerate(sizes)]
    drops = data.draw(st.sets(st.integers(0, 60), max_size=9))  # too few to use the attempts up
    with monkeypatch.context() as patch:
        dropping(patch, shards, drops)
        found = documents("owner/name")
    assert found == [text for shard in shards for text in shard]


def test_any_number_of_drops_is_borne_while_documents_come(monkeypatch, waits):
    dropping(monkeypatch, [[str(i)] for i in range(60)], set(range(1, 2000, 7)))  # going on takes five steps
    assert documents("owner/name") == [str(i) for i in range(60)]
    assert len(waits) > 20


def test_attempts_are_used_up_where_no_document_comes(monkeypatch, waits, capsys):
    dropping(monkeypatch, [[str(i) for i in range(40)]], set(range(0, 1600, 2)))
    with pytest.raises(UserError, match="dropped 10 times in a row at row"):
        documents("owner/name")
    assert len(waits) >= 9
    assert all(1 <= wait <= 60 for wait in waits)
    err = capsys.readouterr().err
    assert "(attempt 2 of 10)" in err
    assert "(attempt 10 of 10)" in err
    assert err.count("\n") == len(waits)


TEXTS = [f"document {i} {random.Random(i).randbytes(500).hex()}" for i in range(120)]


def files_of(kind):
    parts = [TEXTS[:50], TEXTS[50:]]
    if kind == "parquet":
        files = []
        for part in parts:
            file = io.BytesIO()
            pq.write_table(pa.table({"text": part}), file, row_group_size=7)
            files.append(file.getvalue())
    else:
        files = ["".join(json.dumps({"text": text}) + "\n" for text in part).encode() for part in parts]
        if kind == "jsonl.zst":
            files = [pa.compress(file, "zstd", asbytes=True) for file in files]
    return {f"train-{i}.{kind}": file for i, file in enumerate(files)}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_a_real_stream_over_a_connection_that_drops_gives_every_document_once(monkeypatch, waits, tmp_path, kind):
    """What `datasets` and huggingface_hub raise here is what they raise on a real hub; cut answers and busy ones."""

    def fate(_, n):
        if 2 <= n <= 22:
            return -1500 if n % 2 else 503
        return None

    hub = Hub(files_of(kind), fate)
    with served(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        text = open_text("owner/name", 0)
        assert text.revision == COMMIT
        assert list(text.documents) == TEXTS
    assert len(hub.downloads) > 22
    assert waits
