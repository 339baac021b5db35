"""A shard is there as a whole or not at all, whatever happens to its writer."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cache_fixtures import make_cache, make_plan, make_shard, scratch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import (
    ActivationCache,
    CacheError,
    CacheIncomplete,
    DiskFull,
    committed_shards,
    create_cache,
    finalize_cache,
    shard_files,
    verify_cache,
    write_shard,
)
from cache_spec.files import Partial, remove_stale_partials
from cache_spec.layout import record_file

ROOT = Path(__file__).parent.parent
PLAN = make_plan(layers=(1, 3))


@pytest.fixture
def cache(tmp_path) -> Path:
    create_cache(tmp_path / "cache", PLAN)
    return tmp_path / "cache"


def partials(path: Path) -> list[Path]:
    return list(path.rglob("*.partial"))


def test_the_record_says_what_was_written(cache):
    activations, columns = make_shard(PLAN, 2)
    record = write_shard(cache, PLAN, 2, activations, columns)
    assert set(record["files"]) == set(shard_files(PLAN, 2))
    for (hook, variant), rows in activations.items():
        facts = record["files"][f"{hook}/{variant}/c/2/0"]
        assert facts["absmax"] == np.abs(rows.astype(np.float64)).max()
        assert facts["n_nonfinite"] == 0
        assert facts["sum_squares"] == pytest.approx(np.square(rows.astype(np.float64)).sum(), rel=1e-5)
        assert facts["bytes"] == (cache / hook / variant / "c/2/0").stat().st_size
    assert committed_shards(cache, PLAN) == (2,)


@pytest.mark.parametrize("value", [6e-8, -6e-8, 65504.0, -65504.0, 0.0, -0.0, 1.0])
def test_extremes_of_fp16_are_measured_and_kept(cache, value):
    activations, columns = make_shard(PLAN, 0)
    activations["layer_1", "clean"] = np.full_like(activations["layer_1", "clean"], value)
    record = write_shard(cache, PLAN, 0, activations, columns)
    stored = float(abs(np.float16(value)))
    facts = record["files"]["layer_1/clean/c/0/0"]
    assert facts["absmax"] == stored
    assert facts["sum_squares"] == pytest.approx(stored**2 * activations["layer_1", "clean"].size, rel=1e-5)
    kept = ActivationCache.open(cache, allow_partial=True).activations("layer_1", "clean", 0)
    assert kept.tobytes() == activations["layer_1", "clean"].tobytes()


def test_rows_may_lie_scattered_in_memory(cache):
    activations, columns = make_shard(PLAN, 0)
    scattered = {key: np.asfortranarray(rows)[::1] for key, rows in activations.items()}
    write_shard(cache, PLAN, 0, scattered, columns)
    kept = ActivationCache.open(cache, allow_partial=True).activations("layer_3", "masked", 0)
    assert kept.tobytes() == activations["layer_3", "masked"].tobytes()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_value_beyond_fp16_is_refused_and_leaves_nothing(cache, value):
    activations, columns = make_shard(PLAN, 0)
    activations["layer_3", "masked"][17, 2] = value
    before = {path for path in cache.rglob("*") if path.is_file()}
    with pytest.raises(CacheError, match=r"layer_3/masked.*65,504.*scale"):
        write_shard(cache, PLAN, 0, activations, columns)
    assert {path for path in cache.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a, c: a.pop(("layer_1", "clean")), "lacks arrays"),
        (lambda a, c: c.pop("doc"), "doc"),
        (lambda a, c: a.update({("layer_9", "clean"): a["layer_1", "clean"]}), "layer_9"),
        (lambda a, c: a.update({("layer_1", "clean"): a["layer_1", "clean"].astype("f4")}), "float32"),
        (lambda a, c: a.update({("layer_1", "clean"): a["layer_1", "clean"][:-1]}), r"\(63, 6\)"),
        (lambda a, c: c.update({"token": c["token"].astype("i8")}), "int64"),
        (lambda a, c: c.update({"token": c["token"][:, None]}), r"\(64, 1\)"),
    ],
)
def test_arrays_that_are_not_the_plans_are_refused(cache, change, word):
    activations, columns = make_shard(PLAN, 0)
    change(activations, columns)
    with pytest.raises(CacheError, match=word):
        write_shard(cache, PLAN, 0, activations, columns)
    assert committed_shards(cache, PLAN) == ()


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_beyond_the_plan_is_refused(cache, shard):
    with pytest.raises(CacheError, match="no shard"):
        write_shard(cache, PLAN, shard, {}, {})


def test_a_committed_shard_is_never_written_again(cache):
    first = write_shard(cache, PLAN, 0, *make_shard(PLAN, 0))
    times = {file: (cache / file).stat().st_mtime_ns for file in shard_files(PLAN, 0)}
    again = write_shard(cache, PLAN, 0, *make_shard(make_plan(layers=(1, 3), seed=9), 0))
    assert again == first
    assert {file: (cache / file).stat().st_mtime_ns for file in shard_files(PLAN, 0)} == times


@given(seed=st.integers(0, 1000), n_threads=st.integers(2, 5), n_rows=st.integers(1, 150))
@settings(max_examples=20, deadline=None)
def test_the_bytes_do_not_depend_on_the_number_of_threads(seed, n_threads, n_rows):
    plan = make_plan(n_rows=n_rows, seed=seed)
    with scratch() as folder:
        for path, n in ((folder / "alone", 1), (folder / "together", n_threads)):
            create_cache(path, plan)
            for shard in range(plan.n_shards):
                write_shard(path, plan, shard, *make_shard(plan, shard), n_threads=n)
        for shard in range(plan.n_shards):
            for file in (record_file(shard), *shard_files(plan, shard)):
                assert (folder / "alone" / file).read_bytes() == (folder / "together" / file).read_bytes()


def test_what_goes_wrong_on_one_of_several_threads_is_raised_and_nothing_stays(cache):
    activations, columns = make_shard(PLAN, 0)
    activations["layer_3", "masked"][-1, 0] = np.inf
    with pytest.raises(CacheError, match="infinite or NaN"):
        write_shard(cache, PLAN, 0, activations, columns, n_threads=3)
    assert not [file for file in shard_files(PLAN, 0) if (cache / file).exists()]
    assert not list(cache.rglob("*.partial"))


def test_of_writers_that_race_one_commits_and_the_files_are_its_own(cache):
    """Four writers with different bytes, as different GPUs would give: the record must fit the files."""
    records, start = [], threading.Barrier(4)

    def work(seed: int) -> None:
        shard = make_shard(make_plan(layers=(1, 3), seed=seed), 1)
        start.wait()
        records.append(write_shard(cache, PLAN, 1, *shard))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(record == records[0] for record in records)
    assert not partials(cache)
    assert not [p for p in verify_cache(cache) if p.kind == "damaged"]


def test_data_is_on_the_disk_before_its_name_and_the_record_is_last(cache, monkeypatch):
    events: list[tuple[str, str]] = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def name(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", name(fd))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", f"{a} {b}")), replace(a, b)))
    monkeypatch.setattr(os, "link", lambda a, b: (events.append(("name", f"{a} {b}")), link(a, b)))
    write_shard(cache, PLAN, 0, *make_shard(PLAN, 0))
    named = [(i, *text.split()) for i, (what, text) in enumerate(events) if what == "name"]
    assert [final for _, _, final in named][-1] == str(cache / record_file(0))
    assert {final for _, _, final in named[:-1]} == {str(cache / file) for file in shard_files(PLAN, 0)}
    for i, temporary, final in named:
        assert ("sync", temporary) in events[:i], f"{final} got its name before its data was safe"
        assert ("sync", str(Path(final).parent)) in events[i:], f"the name {final} was not made safe"
    last_name = named[-1][0]
    for _, _, final in named[:-1]:
        assert ("sync", str(Path(final).parent)) in events[:last_name], f"the record came before {final} was safe"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("n_writes", [0, 3, 12, 20])
def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(cache, monkeypatch, code, n_writes):
    write, n_left = os.write, [n_writes]

    def full(fd: int, data) -> int:
        if n_left[0] == 0:
            raise OSError(code, os.strerror(code))
        n_left[0] -= 1
        return write(fd, data[: max(1, len(data) // 2)])  # a disk that fills up writes short first

    monkeypatch.setattr(os, "write", full)
    needed = sum(shard_files(PLAN, 1).values())
    with pytest.raises(DiskFull, match=rf"needs {needed:,} bytes and [\d,]+ are free; .* the last finished shard"):
        write_shard(cache, PLAN, 1, *make_shard(PLAN, 1))
    assert not partials(cache)
    assert committed_shards(cache, PLAN) == ()
    monkeypatch.setattr(os, "write", write)
    write_shard(cache, PLAN, 1, *make_shard(PLAN, 1))
    assert committed_shards(cache, PLAN) == (1,)


def test_ctrl_c_leaves_nothing(cache, monkeypatch):
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(cache, PLAN, 0, *make_shard(PLAN, 0))
    assert not partials(cache)


def test_the_janitor_takes_what_a_dead_writer_left_and_spares_a_living_one(cache):
    dead = cache / "layer_1/clean/c/0/.0.0123456789abcdef.partial"
    dead.parent.mkdir(parents=True)
    dead.write_bytes(b"half")
    with Partial(cache / "layer_1/clean/c/1/0") as living:
        living.write(b"half")
        assert remove_stale_partials(cache) == 1
        assert not dead.exists()
        assert len(partials(cache)) == 1
        living.replace()
    assert (cache / "layer_1/clean/c/1/0").read_bytes() == b"half"


WRITER = """
import sys
sys.path[:0] = {paths!r}
from cache_fixtures import make_plan, make_shard
from cache_spec import create_cache, committed_shards, finalize_cache, write_shard
plan = make_plan(n_rows={n_rows}, d_model=64, layers=(1, 3))
path = sys.argv[1]
create_cache(path, plan)
print("ready", flush=True)
for shard in range(plan.n_shards):
    if shard not in committed_shards(path, plan):
        write_shard(path, plan, shard, *make_shard(plan, shard))
finalize_cache(path)
"""


def test_kill_9_at_any_moment_loses_at_most_the_shard_in_progress(tmp_path):
    path, n_rows = tmp_path / "cache", 900
    plan = make_plan(n_rows=n_rows, d_model=64, layers=(1, 3))
    code = WRITER.format(paths=[str(ROOT), str(ROOT / "tests")], n_rows=n_rows)
    rng = np.random.default_rng(0)
    n_killed, committed_before = 0, 0
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        shards = committed_shards(path, plan)
        assert len(shards) >= committed_before, "a committed shard was lost"
        committed_before = len(shards)
        assert not [p for p in verify_cache(path) if p.kind == "damaged"]
        partly = ActivationCache.open(path, allow_partial=True)
        for shard in shards:
            wanted = make_shard(plan, shard)[0]["layer_3", "masked"]
            assert partly.activations("layer_3", "masked", shard).tobytes() == wanted.tobytes()
        if len(shards) < plan.n_shards:
            with pytest.raises(CacheIncomplete):
                ActivationCache.open(path)
    assert n_killed > 0, "no writer lived long enough to be killed"
    make_cache(path, plan)
    assert verify_cache(path) == []


def test_a_process_killed_between_the_files_and_the_record_leaves_orphans_that_the_next_overwrites(cache, monkeypatch):
    monkeypatch.setattr("cache_spec.commit.write_new_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_shard(cache, PLAN, 0, *make_shard(make_plan(layers=(1, 3), seed=5), 0))
    monkeypatch.undo()
    assert committed_shards(cache, PLAN) == ()
    assert {p.file for p in verify_cache(cache) if p.kind == "leftover"} >= set(shard_files(PLAN, 0))
    make_cache(cache, PLAN)
    assert verify_cache(cache) == []


def test_any_process_may_make_any_shard_in_any_order(tmp_path):
    plan = make_plan(n_rows=300)
    a, b = tmp_path / "a", tmp_path / "b"
    make_cache(a, plan)
    create_cache(b, plan)
    for shard in (4, 0, 3, 1, 2):
        write_shard(b, plan, shard, *make_shard(plan, shard))
    finalize_cache(b)
    for file in {f for shard in range(plan.n_shards) for f in shard_files(plan, shard)}:
        assert (a / file).read_bytes() == (b / file).read_bytes()
