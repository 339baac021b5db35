"""A cache from a stranger: links are refused, sizes are looked at before memory is taken, and nothing is run."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_fixtures import make_cache, make_plan
from fuzz_fixtures import bounded, everything, sealed, spelled
from fuzz_targets import forge, use_cache

from cache_spec import ActivationCache, CacheDamaged, CacheError, UserError, create_cache
from cache_spec.files import read_json
from cache_spec.hook_point import HookPoint
from cache_spec.info import describe
from cache_spec.layout import MANIFEST, PLAN, RECORDS, ROOT, record_file
from cache_spec.plan import check_plan
from cache_spec.push import plan_push
from cache_spec.transcode import transcode
from cache_spec.untrusted import MOST_BYTES, json_of, printable, read_bounded, refuse_links
from cache_spec.verify import verify_cache

LINKED = (
    *(PLAN, ROOT, MANIFEST, record_file(0), "layer_1/zarr.json", "layer_1/clean/c/1/0", "rows/token/c/0"),
    *(RECORDS, "_granary", "layer_1", "layer_1/clean/c", "layer_1/clean/c/2", "rows"),
)


@pytest.fixture
def cache(tmp_path) -> Path:
    return make_cache(tmp_path / "cache", make_plan())


@pytest.mark.parametrize("file", LINKED)
def test_a_link_in_a_cache_is_refused_by_name_and_nothing_behind_it_is_touched(cache, tmp_path, file):
    outside = tmp_path / "outside"
    shutil.move(cache / file, outside)
    (cache / file).symlink_to(outside)
    before = everything(tmp_path)
    for use in (ActivationCache.open, verify_cache, plan_push_of, lambda path: transcode(path, tmp_path / "out")):
        with pytest.raises(CacheDamaged, match=re.escape(f"{cache / file} is a link")):
            use(cache)
    with pytest.raises(CacheDamaged, match="is a link"):
        create_cache(cache, make_plan())
    assert everything(tmp_path) == before


def plan_push_of(cache: Path) -> object:
    return plan_push(cache, None)  # pyright: ignore[reportArgumentType]


def test_a_link_that_would_be_written_through_is_refused_before_the_plan_is_there(tmp_path):
    cache = make_cache(tmp_path / "cache", make_plan(), shards=range(0), finalize=False)
    (cache / PLAN).unlink()
    (tmp_path / "outside").mkdir()
    shutil.rmtree(cache / RECORDS)
    (cache / RECORDS).symlink_to(tmp_path / "outside")
    with pytest.raises(CacheDamaged, match="shards is a link"):
        create_cache(cache, make_plan())
    assert not list((tmp_path / "outside").iterdir())


def test_the_cache_itself_may_be_reached_through_a_link(cache, tmp_path):
    (tmp_path / "here").symlink_to(cache)
    assert ActivationCache.open(tmp_path / "here").shards == (0, 1, 2)


@pytest.mark.parametrize("file", [PLAN, ROOT, record_file(0), "layer_1/clean/c/0/0"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(cache, file):
    (cache / file).unlink()
    os.mkfifo(cache / file)
    with bounded(), pytest.raises(CacheError, match=r"neither a file nor a folder|no plain file"):
        ActivationCache.open(cache)


def test_what_is_no_file_is_not_read():
    with pytest.raises(ValueError, match="no plain file"):
        read_bounded(Path("/dev/zero"))


def test_a_document_of_a_terabyte_is_not_read(cache):
    with (cache / PLAN).open("r+b") as file:
        file.truncate(2**40)
    with bounded(), pytest.raises(CacheDamaged, match=f"{MOST_BYTES:,} are the most that are read"):
        ActivationCache.open(cache)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 60 + "]" * 60, "too deep"),
        ("[" * 10**6 + "]" * 10**6, "too deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "too deep"),
        ("1" * 41, "41 digits"),
        ("-" + "1" * 5000, "5001 digits"),
        ('{"a": "\\ud800"}', "half a character"),
        ("1e999", "no number"),
        ("[NaN]", "no number"),
        ("\\xff", "Expecting value"),
    ],
)
def test_json_that_nobody_would_write_is_refused(tmp_path, text, word):
    (tmp_path / "document").write_text(text + "\n")
    with bounded(), pytest.raises(CacheDamaged, match=word):
        read_json(tmp_path / "document")


def test_json_as_we_write_it_is_read():
    true = {"a": [{"b": [1, 2.5, "ü", "\N{GRINNING FACE}", None, True]}] * 100, "c": 2**63}
    assert json_of(json.dumps(true).encode(), finite=True) == true
    assert json_of(b"[NaN]") != json_of(b"[NaN]")  # where others wrote it, it may hold NaN


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_rows": 10**18}, "n_rows"),
        ({"shard_rows": 2**60, "n_train_rows": 0}, "at most"),
        ({"shard_rows": 2**40, "chunk_rows": 1, "n_train_rows": 0}, "inner chunks"),
        ({"shard_rows": 2**40, "chunk_rows": 2**40, "n_train_rows": 0}, "inner chunk of"),
        ({"n_rows": 2**48, "n_train_rows": 0, "n_train_windows": 2**40}, "windows"),
    ],
)
def test_a_plan_of_sizes_that_nobody_has_is_refused_at_once(cache, change, word):
    facts = {**json.loads((cache / PLAN).read_bytes()), **change}
    forge(cache, facts)
    with bounded(), pytest.raises(CacheDamaged, match=word):
        ActivationCache.open(cache, allow_partial=True)
    with bounded():
        use_cache(cache)


def test_a_plan_of_more_rows_than_any_disk_holds_is_told_of_without_making_a_list_of_them(cache):
    (cache / record_file(2)).unlink()  # it was short, and now it is not the last
    forge(cache, {**json.loads((cache / PLAN).read_bytes()), "n_rows": 2**48})
    with bounded(seconds=10, n_bytes=2**29):
        opened = ActivationCache.open(cache, allow_partial=True)
        assert "2 of 4398046511104 committed" in describe(opened)
        assert any("lacks the records of" in problem.what for problem in verify_cache(cache))


@pytest.mark.parametrize("text", ["٣", "layer_" + "1" * 300, "9" * 5000, "layer_1/../../x", "../layer_1", "/1", "1\n2"])
def test_a_hook_point_that_leads_elsewhere_is_none(text):
    with pytest.raises(UserError, match="is not a hook point"):
        HookPoint.parse(text)


@pytest.mark.parametrize("name", ["../masked", "a/b", "/masked", "masked\0", "x" * 65, "Masked", "c\n"])
def test_a_variant_whose_name_leads_elsewhere_is_refused(name):
    plan = make_plan()
    bad = type(plan.variants[1])(name=name, kind="mask", mask_prob=0.3)
    with pytest.raises(UserError, match="needs a lower-case name"):
        check_plan(type(plan)(**{**vars_of(plan), "variants": (plan.variants[0], bad)}))


def vars_of(plan) -> dict:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def test_a_record_without_what_info_tells_is_refused(cache):
    record = json.loads((cache / record_file(1)).read_bytes())
    del record["files"]["layer_1/clean/c/1/0"]["absmax"]
    (cache / record_file(1)).write_bytes(spelled(sealed(record)))
    with pytest.raises(CacheDamaged, match="has no absmax"):
        ActivationCache.open(cache)


def test_an_array_that_is_a_pickle_is_not_opened(cache, tmp_path):
    np.save(cache / "_granary/windows.npy", np.array([os.mkdir], dtype=object), allow_pickle=True)
    facts = json.loads((cache / PLAN).read_bytes())
    forge(cache, {**facts, "source": {**facts["source"], "windows_sha256": "0" * 64}})
    with pytest.raises(CacheDamaged, match=r"windows\.npy is missing, cut short or changed"):
        ActivationCache.open(cache, allow_partial=True)


def test_names_that_a_stranger_chose_cannot_move_the_cursor(cache):
    facts = json.loads((cache / PLAN).read_bytes())
    forge(cache, {**facts, "model": {"id": "\x1b[2J\x1b]0;owned\x07\u202eevil\x9b1m"}})
    told = describe(ActivationCache.open(cache, allow_partial=True))
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(told)
    assert "\\x1b[2J" in told


@pytest.mark.parametrize("text", ["plain", "Größe 2 µm², 日本語\n\tindented", "\N{GRINNING FACE}"])
def test_text_of_people_is_printed_as_it_is(text):
    assert printable(text) == text


def test_a_folder_that_is_tidied_up_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def vanishing(path):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    refuse_links(tmp_path, "put it there")
