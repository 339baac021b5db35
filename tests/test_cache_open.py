"""Opening: what can be read is read, and everything else gets one sentence and its own kind of error."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_fixtures import make_cache, make_plan, make_shard

from cache_spec import (
    ActivationCache,
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheNotFound,
    CacheTooNew,
    committed_shards,
    create_cache,
    finalize_cache,
    write_shard,
)
from cache_spec.files import check_seal, read_json, readable_json, seal
from cache_spec.layout import record_file
from cache_spec.plan import SPEC_VERSION

PLAN = make_plan(layers=(1, 3))
ACTIVATIONS, COLUMN, RECORD = "layer_3/masked/c/1/0", "rows/doc/c/2", record_file(1)


@pytest.fixture
def path(tmp_path) -> Path:
    return make_cache(tmp_path / "cache", PLAN)


def refused(path: Path, error: type[CacheError], *words: str) -> None:
    """Opening fails with exactly this error, in one sentence that names the place and these words."""
    with pytest.raises(error) as caught:
        ActivationCache.open(path)
    assert type(caught.value) is error
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in (str(path), *words):
        assert word in sentence


def test_a_whole_cache_opens(path):
    cache = ActivationCache.open(str(path))
    assert cache.plan == PLAN
    assert cache.status == "complete"
    assert (cache.shards, cache.train_shards, cache.held_out_shards) == ((0, 1, 2), (0, 1), (2,))
    assert [cache.rows_in(shard) for shard in cache.shards] == [64, 64, 22]


def test_a_path_that_is_not_there(tmp_path):
    refused(tmp_path / "nothing", CacheNotFound, "nothing at", "harvest")


def test_a_missing_cache_is_also_a_missing_file_to_python(tmp_path):
    with pytest.raises(FileNotFoundError):
        ActivationCache.open(tmp_path / "nothing")


def test_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", CacheNotFound, "is a file")


def test_an_ordinary_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, CacheNotFound, "no activation cache")


def test_another_zarr_group(tmp_path):
    zarr.create_group(tmp_path / "other", attributes={"a": 1})
    refused(tmp_path / "other", CacheNotFound, "no activation cache")


def test_a_folder_whose_creation_was_cut_short(path):
    (path / "_granary/plan.json").unlink()
    refused(path, CacheIncomplete, "being created", "run the same harvest")


@pytest.mark.parametrize("n_there", [0, 2])
def test_a_cache_without_all_shards(tmp_path, n_there):
    path = make_cache(tmp_path / "cache", PLAN, shards=range(n_there), finalize=False)
    refused(path, CacheIncomplete, f"{n_there} of 3 shards", "run the same harvest")
    cache = ActivationCache.open(path, allow_partial=True)
    assert (cache.status, cache.shards) == ("harvesting", tuple(range(n_there)))


def test_a_cache_that_was_closed_early(tmp_path):
    path = make_cache(tmp_path / "cache", PLAN, shards=range(2), finalize=False)
    finalize_cache(path, partial=True)
    refused(path, CacheIncomplete, "closed early", "2 of 3 shards")
    assert ActivationCache.open(path, allow_partial=True).status == "partial"
    make_cache(path, PLAN)
    assert ActivationCache.open(path).status == "complete"


def test_a_cache_with_all_shards_that_was_not_closed(tmp_path):
    refused(make_cache(tmp_path / "cache", PLAN, finalize=False), CacheIncomplete, "not finished", "3 of 3")


@pytest.mark.parametrize("file", [ACTIVATIONS, COLUMN])
@pytest.mark.parametrize("n_bytes", [0, 100, -1])
def test_a_truncated_file(path, file, n_bytes):
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[:n_bytes])
    refused(path, CacheDamaged, file, "bytes instead of", record_file(int(file.split("/c/")[1][0])))


def test_a_file_that_grew(path):
    with (path / ACTIVATIONS).open("ab") as file:
        file.write(b"\0")
    refused(path, CacheDamaged, ACTIVATIONS, "bytes instead of")


@pytest.mark.parametrize("file", [ACTIVATIONS, COLUMN])
def test_a_missing_file(path, file):
    (path / file).unlink()
    refused(path, CacheDamaged, file, "missing", "delete")


@pytest.mark.parametrize("file", ["_granary/plan.json", "zarr.json", RECORD])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"7",
        b'{"a": NaN}',
        b"[" * 100_000,
        b"1" * 5000,
        b'{"seed": 1e999}',
    ],
)
def test_mangled_json(path, file, content):
    (path / file).write_bytes(content)
    refused(path, CacheDamaged, file)


def test_a_lost_record(path):
    (path / RECORD).unlink()
    refused(path, CacheDamaged, RECORD, "lost")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cache_id": "0" * 16}, "cache_id"),
        ({"shard": 0}, "shard 0"),
        ({"rows": 63}, "rows 63"),
        ({"files": {}}, "files of this plan"),
        ({"files": None}, "files of this plan"),
        ({"spec_version": None}, "spec_version"),
    ],
)
def test_a_wrong_record(path, change, word):
    rewrite_record(path, change)
    refused(path, CacheDamaged, RECORD, word)


@pytest.mark.parametrize(
    "facts", [None, {}, {"crc32c": "x"}, {"crc32c": []}, {"crc32c": ["0" * 8]}, {"crc32c": ["zz"] * 4}]
)
def test_a_record_without_proper_checksums(path, facts):
    record = read_json(path / RECORD)
    rewrite_record(path, {"files": {**record["files"], ACTIVATIONS: facts}})
    refused(path, CacheDamaged, RECORD, f"checksums for {ACTIVATIONS}")


def test_a_record_with_another_size(path):
    files = read_json(path / RECORD)["files"]
    rewrite_record(path, {"files": {**files, ACTIVATIONS: {**files[ACTIVATIONS], "bytes": 1}}})
    refused(path, CacheDamaged, RECORD, ACTIVATIONS, "1 bytes")


def test_a_record_that_was_edited_without_its_checksum(path):
    (path / RECORD).write_bytes(readable_json(read_json(path / RECORD) | {"host": "elsewhere"}))
    refused(path, CacheDamaged, RECORD, "checksum")


def test_a_record_of_a_shard_beyond_the_plan(path):
    (path / record_file(7)).write_bytes((path / RECORD).read_bytes())
    refused(path, CacheDamaged, record_file(7), "beyond")


def test_a_record_may_say_more_than_this_version_knows(path):
    rewrite_record(path, {"spec_version": "1.4", "temperature": 21})
    assert ActivationCache.open(path).records[1]["temperature"] == 21


def rewrite_record(path: Path, change: dict) -> None:
    record = check_seal(read_json(path / RECORD), path / RECORD)
    (path / RECORD).write_bytes(readable_json(seal(record | change)))


@pytest.mark.parametrize("file", ["_granary/plan.json", "zarr.json", RECORD])
def test_a_newer_major_version(path, file):
    text = (path / file).read_text()
    (path / file).write_text(text.replace(f'"spec_version": "{SPEC_VERSION}"', '"spec_version": "2.0"'))
    refused(path, CacheTooNew, file, "2.0")


def test_the_root_of_another_cache(path, tmp_path):
    other = make_cache(tmp_path / "other", make_plan(seed=1))
    (path / "zarr.json").write_bytes((other / "zarr.json").read_bytes())
    refused(path, CacheDamaged, "belongs to cache")


def test_an_unknown_status(path):
    root = json.loads((path / "zarr.json").read_bytes())
    facts = check_seal(root["attributes"]["granary"], path)
    root["attributes"]["granary"] = seal({**facts, "status": "resting"})
    (path / "zarr.json").write_bytes(readable_json(root))
    refused(path, CacheDamaged, "resting")


def test_a_damaged_shard_can_be_made_again_as_the_error_says(path):
    (path / ACTIVATIONS).unlink()
    refused(path, CacheDamaged, f"delete {path / RECORD}")
    (path / RECORD).unlink()
    create_cache(path, PLAN)
    assert committed_shards(path, PLAN) == (0, 2)
    write_shard(path, PLAN, 1, *make_shard(PLAN, 1))
    finalize_cache(path)
    assert ActivationCache.open(path).shards == (0, 1, 2)


@pytest.mark.parametrize("spelling", ["3", "layer_3", "resid_post.3", "model.layers.3", "blocks.3.hook_resid_post"])
def test_a_hook_point_in_any_spelling(path, spelling):
    assert ActivationCache.open(path).hook(spelling) == PLAN.hooks[1]


@pytest.mark.parametrize("spelling", ["2", "mlp_out.3", "third", ""])
def test_a_hook_point_that_the_cache_lacks(path, spelling):
    with pytest.raises(CacheError, match=r"layer_1, layer_3"):
        ActivationCache.open(path).hook(spelling)


def test_a_variant_that_the_cache_lacks(path):
    cache = ActivationCache.open(path)
    assert cache.variant("masked") == PLAN.variants[1]
    with pytest.raises(CacheError, match=r"clean, masked, not noisy"):
        cache.variant("noisy")


def test_a_column_that_the_cache_lacks(path):
    with pytest.raises(CacheError, match=r"token_masked, not colour"):
        ActivationCache.open(path).column("colour", 0)


def test_a_column_whose_bits_changed(path):
    data = bytearray((path / COLUMN).read_bytes())
    data[5] ^= 1
    (path / COLUMN).write_bytes(data)
    cache = ActivationCache.open(path)
    with pytest.raises(CacheDamaged, match=COLUMN):
        cache.column("doc", 2)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("shard", [0, 2])  # to train on, and held out
@pytest.mark.parametrize("place", [0, 200, -5])  # the first inner chunk, the second, the index
def test_an_activation_file_whose_bits_changed_is_refused_at_its_first_use(path, shard, place):
    file = path / f"layer_3/masked/c/{shard}/0"
    flip(file, place)
    cache = ActivationCache.open(path)
    with pytest.raises(CacheDamaged) as caught:
        cache.activations("layer_3", "masked", shard)
    for words in (str(file), str(path / record_file(shard)), "run the same harvest"):
        assert words in str(caught.value)
    with pytest.raises(CacheDamaged):  # still, and not only the first time
        cache.read("layer_3", "masked", np.array([64 * shard]))
    cache.activations("layer_3", "clean", shard)
    assert ActivationCache.open(path, check=False).activations("layer_3", "masked", shard).shape[1] == 6


def test_an_activation_file_is_checked_once(path, monkeypatch):
    checked = []
    monkeypatch.setattr("cache_spec.cache.activation_fault", lambda file, *_: checked.append(file) or "")
    cache = ActivationCache.open(path)
    for _ in range(2):
        cache.activations("layer_1", "clean", 0)
        cache.read("layer_1", "clean", np.arange(150))
    assert checked == [path / f"layer_1/clean/c/{shard}/0" for shard in cache.shards]
    ActivationCache.open(path, check=False).activations("layer_1", "clean", 0)
    assert len(checked) == 3


def test_a_shard_that_is_not_committed_is_not_read(tmp_path):
    cache = ActivationCache.open(make_cache(tmp_path / "c", PLAN, shards=range(1), finalize=False), allow_partial=True)
    with pytest.raises(CacheError, match="no shard 2"):
        cache.activations("layer_1", "clean", 2)
    with pytest.raises(CacheError, match="no shard 1"):
        cache.read("layer_1", "clean", np.array([0, 64]))


@pytest.mark.parametrize("rows", [[-1], [150], [[0]], [0.5]])
def test_rows_that_are_not_there_are_not_read(path, rows):
    with pytest.raises(CacheError, match="rows"):
        ActivationCache.open(path).read("layer_1", "clean", np.array(rows))


def test_a_window_number_of_a_plan_without_masking_has_no_masked_tokens(tmp_path):
    plan = dataclasses.replace(PLAN, variants=PLAN.variants[:1])
    cache = ActivationCache.open(make_cache(tmp_path / "clean_only", plan))
    with pytest.raises(CacheError, match="columns"):
        cache.column("token_masked", 0)
