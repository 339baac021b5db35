"""Text: what a document is in each kind of source, and one sentence for each source that cannot be read."""

import hashlib
import itertools
import json

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError

from cache_spec import UserError
from harvest import hub_text
from harvest.text import open_text, text_facts, text_id


def documents(source):
    return list(open_text(str(source), seed=0).documents)


def write_jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_the_documents_of_a_txt_stand_between_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\none\nstill one\n\n  two  \n \t\n\n\nthree\n")
    assert documents(path) == ["one\nstill one", "two  ", "three"]


def test_a_folder_of_txt_holds_one_document_a_file_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\n\nstill second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not a text")
    write_jsonl(tmp_path / "sub" / "c.jsonl", [{"text": "third"}, {"text": "fourth"}])
    assert documents(tmp_path) == ["first", "second\n\nstill second", "third", "fourth"]


def test_the_documents_of_a_jsonl_are_its_text_fields(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ein\n\nStück", "id": 1}, {"text": ""}])
    path.write_text(path.read_text() + "\n")
    assert documents(path) == ["ein\n\nStück", ""]


@pytest.mark.parametrize(
    ("line", "fault"),
    [("{", "no JSON object"), ('{"txt": "a"}', "no JSON object"), ("[1]", "no JSON object"), ('{"text": 3}', "is int")],
)
def test_a_wrong_line_of_a_jsonl_is_named(tmp_path, line, fault):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError, match=f"line 2 of .*a.jsonl .*{fault}"):
        documents(path)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "sub/missing.txt", "missing", "/no/such/folder"])
def test_text_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no text at {name}"):
        documents(name)


def test_a_file_of_another_kind_an_empty_folder_and_another_encoding_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(UserError, match=r"neither .txt nor .jsonl"):
        documents(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"no .txt and no .jsonl"):
        documents(tmp_path)
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        documents(tmp_path / "a.txt")


def test_the_embedded_text_follows_the_seed():
    first, again, other = (list(itertools.islice(open_text("embedded", seed).documents, 3)) for seed in (0, 0, 1))
    assert first == again != other


def test_a_text_is_known_by_its_name_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a")
    assert text_id("book.txt") == text_id("./book.txt") == text_id(str(tmp_path / "book.txt")) == "book.txt"
    assert text_id(str(tmp_path)) == text_id(".") == tmp_path.name
    assert text_id("gone/book.txt") == "book.txt"
    assert text_id("owner/name:config@abc") == "owner/name:config"
    assert text_id("embedded") == "embedded"
    assert open_text("book.txt", 0).id == "book.txt"


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set in memory; returns the calls made to it."""
    calls = []
    columns = {"text": [{"text": f"document {i}"} for i in range(3)], "other": [{"body": "x"}]}

    def load(repo, config, **facts):
        calls.append((repo, config, facts))
        if config == "wrong":
            raise ValueError("BuilderConfig 'wrong' not found.\nand more")
        return datasets.IterableDataset.from_generator(lambda: iter(columns[config or "text"]))

    monkeypatch.setattr(hub_text, "hf_hub_download", lambda repo, file, **facts: f"/cache/snapshots/c0ffee/{file}")
    monkeypatch.setattr(hub_text, "load_dataset", load)
    return calls


def test_a_hub_data_set_is_streamed_at_the_commit_that_is_recorded(hub):
    text = open_text("owner/name@main", 0)
    assert (text.id, text.revision) == ("owner/name", "c0ffee")
    assert list(text.documents) == ["document 0", "document 1", "document 2"]
    assert hub == [("owner/name", None, {"split": "train", "streaming": True, "revision": "c0ffee"})]


def test_a_hub_data_set_without_text_or_without_the_config_says_so(hub):
    with pytest.raises(UserError, match="no column 'text', only body"):
        documents("owner/name:other")
    with pytest.raises(UserError, match=r"cannot be read: BuilderConfig 'wrong' not found.$"):
        documents("owner/name:wrong")


def test_a_hub_that_cannot_be_reached_or_lacks_the_data_set_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no text at 'owner/name' here, and the Hugging Face hub cannot be reached"):
        documents("owner/name")

    def download(*_, **__):
        raise EntryNotFoundError("not there")

    monkeypatch.setattr(hub_text, "hf_hub_download", download)
    with pytest.raises(UserError, match="hub has no data set 'owner/name'"):
        documents("owner/name@v1")


def test_the_facts_of_a_local_text_are_those_that_sha256sum_prints(tmp_path):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "one.txt").write_text("one")
    (folder / "below" / "two.txt").write_text("two")
    (folder / "notes.md").write_text("no text")
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    assert text_facts(str(folder / "one.txt")) == {"text_bytes": 3, "text_sha256": one}
    printed = f"{two}  below/two.txt\n{one}  one.txt\n".encode()
    assert text_facts(str(folder)) == {"text_bytes": 6, "text_sha256": hashlib.sha256(printed).hexdigest()}
    assert text_facts("embedded") == text_facts(str(tmp_path / "gone.txt")) == text_facts("owner/name") == {}
