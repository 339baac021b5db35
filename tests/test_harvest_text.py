"""Text: what a document is in each kind of source, and one sentence for each source that cannot be read."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_spec import UserError
from harvest.hub_name import PRESETS, HubName, parse_hub_name
from harvest.local_text import paragraphs
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


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \t\n\u00a0"), max_size=40))
def test_paragraphs_read_line_by_line_are_those_of_the_whole_text(text):
    whole = [part for part in re.split(r"\n[^\S\n]*\n\s*", text.strip()) if part]
    assert list(paragraphs(io.StringIO(text))) == whole


def write_parquet(path, values, kind=None, rows_at_once=3, **columns):
    table = pa.table({"id": range(len(values)), "text": pa.array(values, kind), **columns})
    pq.write_table(table, path, row_group_size=rows_at_once)
    return path


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12),
    rows_at_once=st.integers(1, 5),
    kind=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
)
def test_the_documents_of_a_parquet_are_its_column_text(tmp_path, values, rows_at_once, kind):
    path = write_parquet(tmp_path / "a.parquet", values, kind, rows_at_once)
    assert documents(path) == values


def test_a_parquet_is_read_one_group_of_rows_at_a_time(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x" * 2**20 + str(i) for i in range(40)], rows_at_once=1)
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for _ in open_text(str(path), 0).documents:
        peak = max(peak, pool.bytes_allocated() - before)
    assert peak < 8 * 2**20


def test_a_parquet_without_a_column_of_text_says_what_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no column 'text', only body, n"):
        documents(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"the column 'text' of .*b.parquet holds int64, not strings"):
        documents(write_parquet(tmp_path / "b.parquet", [1, 2]))
    with pytest.raises(UserError, match=r"row 5 of .*c.parquet has a 'text' that is empty"):
        documents(write_parquet(tmp_path / "c.parquet", ["a", "b", "c", "d", None]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_parquet_gives_a_sentence_or_its_text(tmp_path, data):
    path = write_parquet(tmp_path / "a.parquet", [f"document {i}" for i in range(9)])
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path.write_bytes(damaged)
    with contextlib.suppress(UserError):  # anything else is a fault of ours
        documents(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a.parquet cannot be read, it may be damaged"):
        documents(path)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_compressed_text_reads_as_the_one_inside(tmp_path, packed, kind):
    texts = [f"document {i} " + "word " * i for i in range(500)]
    plain = ("\n\n".join(texts) if kind == ".txt" else "\n".join(json.dumps({"text": text}) for text in texts)).encode()
    halves = plain[:9000], plain[9000:]  # archives are often several joined
    pack = gzip.compress if packed == ".gz" else lambda part: pa.compress(part, "zstd", asbytes=True)
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(b"".join(map(pack, halves)))
    (tmp_path / f"plain{kind}").write_bytes(plain)
    assert documents(path) == documents(tmp_path / f"plain{kind}") != []
    path.write_bytes(pack(plain)[:-200])
    with pytest.raises(UserError, match=f"a{kind}{packed} cannot be read, it may be damaged"):
        documents(path)


def test_a_folder_may_mix_kinds_and_is_read_by_the_names_in_it(tmp_path):
    for name in ("b", "a", "a-b"):
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "a" / "2.parquet", ["second", "third"])
    (tmp_path / "a" / "1.txt").write_text("first")
    write_jsonl(tmp_path / "a-b" / "0.jsonl", [{"text": "fourth"}])
    (tmp_path / "b" / "0.txt.gz").write_bytes(gzip.compress(b"fifth"))
    (tmp_path / "b" / "folder.txt").mkdir()
    assert documents(tmp_path) == ["first", "second", "third", "fourth", "fifth"]


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
    [
        ("{", "no JSON object"),
        ('{"txt": "a"}', "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"text": 3}', "is int"),
        ('{"text": null}', "is empty"),
        ('{"text": "half \\ud800 a pair"}', "half of a surrogate pair"),
        ("[" * 100_000, "no JSON object"),
    ],
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
    for name in ("a.csv", "a.parquet.gz", "a.gz", "parquet"):
        (tmp_path / name).write_text("text\n")
        with pytest.raises(UserError, match=rf"{name} is not a .txt, .jsonl or .parquet"):
            documents(tmp_path / name)
    with pytest.raises(UserError, match=r"holds no text; give one that holds a .txt"):
        documents(tmp_path)
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt is not UTF-8"):
        documents(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"line 2 of .*a.jsonl is not UTF-8"):
        documents(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")  # as Windows writes it
    assert documents(tmp_path / "a.txt") == ["one", "two"]


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


def test_a_hub_data_set_may_name_its_config_split_and_column():
    assert parse_hub_name("owner/name") == HubName(repo="owner/name")
    assert parse_hub_name("owner/name:en@v1") == HubName(repo="owner/name", config="en")
    assert parse_hub_name("owner/name:en:test#body@v1") == HubName(
        repo="owner/name", config="en", split="test", column="body"
    )
    assert parse_hub_name("owner/name::test") == HubName(repo="owner/name", split="test")
    assert parse_hub_name("owner/name#a b") == HubName(repo="owner/name", column="a b")
    for other in ("name", "a/b/c", "a b/c", "owner/name:a:b:c", "owner/name#", "/owner"):
        assert parse_hub_name(other) is None


def test_a_preset_is_known_by_its_name_and_hub_id(tmp_path, monkeypatch):
    assert sorted(PRESETS) == ["fineweb", "openwebtext", "pile", "pile-cc"]
    assert text_id("pile-cc") == text_id("pile-cc@abc") == "pile-cc (monology/pile-uncopyrighted)"
    assert text_id("fineweb") == "fineweb (HuggingFaceFW/fineweb)"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a.txt").write_text("mine")
    assert (documents("./pile"), text_id("./pile")) == (["mine"], "pile")
    assert text_id("pile") == "pile (monology/pile-uncopyrighted)"
    assert text_facts("pile") == {}


def test_an_unknown_name_gets_the_presets_named():
    with pytest.raises(UserError, match="a preset \\(fineweb, openwebtext, pile, pile-cc\\)"):
        documents("pilecc")
