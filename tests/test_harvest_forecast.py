"""The forecast: bytes that are right, a time read at a glance, the truth about what is there, and a no in time."""

import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from cache_fixtures import make_cache, make_hook, make_plan
from hypothesis import example, given
from hypothesis import strategies as st

from cache_spec import DiskFull, UserError, VariantPlan, cache_bytes, committed_shards
from harvest.forecast import duration, forecast, print_forecast, refuse_if_full, size
from harvest.share import Share, read_share

ALONE = Share()
Usage = namedtuple("Usage", "total used free")


def free_bytes(monkeypatch, n_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**15, 0, n_bytes))


def printed(capsys, plan, out, ahead, share=ALONE, device="cpu"):
    """The printed lines by their first word."""
    print_forecast(plan, out, ahead, share, device)
    return {line[:10].strip(): line[10:] for line in capsys.readouterr().out.splitlines()}


def test_the_bytes_of_a_cache_are_the_bytes_it_takes(tmp_path):
    plan = make_plan(layers=(1, 2), n_masked=2)
    ahead = forecast(plan, tmp_path / "new", range(plan.n_shards), ALONE, None)
    windows = 8 * plan.window_tokens * (plan.n_train_windows + plan.n_held_out_windows)
    cache = make_cache(tmp_path / "cache", plan)
    written = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert ahead.bytes_needed == sum(path.stat().st_size for path in written) + windows
    assert ahead.bytes_needed == cache_bytes(plan) + windows


@given(there=st.sets(st.integers(0, 2)), count=st.integers(1, 4), index=st.integers(0, 3))
def test_the_bytes_are_those_of_all_missing_shards_and_the_rows_those_of_this_process(there, count, index):
    plan, share = make_plan(), Share(index=index % count, count=count, source="--shard")
    missing = [shard for shard in range(plan.n_shards) if shard not in there]
    ahead = forecast(plan, Path("/nowhere"), missing, share, 10.0)
    windows = 8 * plan.window_tokens * (plan.n_train_windows + plan.n_held_out_windows)
    others = [forecast(plan, Path("/nowhere"), [shard], ALONE, None) for shard in missing]
    assert ahead.bytes_needed - windows == sum(other.bytes_needed - windows for other in others)
    own = [shard for shard in missing if share.owns(shard)]
    assert (ahead.n_missing, ahead.n_own) == (len(missing), len(own))
    assert ahead.n_rows == sum(map(plan.rows_in, own))
    assert ahead.seconds == ahead.n_rows * 2 / 10.0  # clean and masked


def test_an_existing_cache_is_described_as_it_is(tmp_path, capsys):
    plan = make_plan()
    cache = make_cache(tmp_path / "cache", plan, shards=range(1), finalize=False)
    missing = [shard for shard in range(plan.n_shards) if shard not in committed_shards(cache, plan)]
    ahead = forecast(plan, cache, missing, ALONE, 5.0)
    lines = printed(capsys, plan, cache, ahead)
    assert lines["shards"] == "3 of 64 rows: 1 there, 2 missing"
    assert lines["disk"].startswith(f"{size(ahead.bytes_needed)} needed")
    make_cache(cache, plan)
    done = forecast(plan, cache, [], ALONE, None)
    assert (done.bytes_needed, done.n_rows) == (0, 0)
    lines = printed(capsys, plan, cache, done)
    assert lines["shards"] == "3 of 64 rows: 3 there, 0 missing"
    assert lines["disk"].startswith("0 bytes needed")
    assert lines["time"] == "nothing left to do"


def test_everything_is_said_before_the_start(tmp_path, capsys, monkeypatch):
    free_bytes(monkeypatch, 5 * 10**12)
    random = VariantPlan(name="random", kind="random", mask_prob=0.1)
    words = VariantPlan(name="masked_1", kind="mask_word", mask_prob=0.5, mask_string="_", mask_token=3)
    plan = make_plan(layers=(1, 3))
    plan = replace(plan, hooks=(plan.hooks[0], replace(plan.hooks[1], scale_factor=4.0)))
    plan = replace(plan, variants=(*plan.variants, words, random), source={**plan.source, "revision": "abc123" * 7})
    share = read_share("", {"RANK": "1", "WORLD_SIZE": "2"})
    lines = printed(capsys, plan, tmp_path, forecast(plan, tmp_path, [0, 1, 2], share, 0.1), share, "cuda:1")
    assert lines["model"] == "made-up (toy, float32, revision 0)"
    assert (
        lines["layers"]
        == "resid_post.1 (gpt_neox.layers.1, 6 wide), resid_post.3 (gpt_neox.layers.3, 6 wide, stored / 4)"
    )
    assert lines["variants"] == (
        "clean, masked (p = 0.3) by '...', masked_1 (p = 0.5, whole words) by '_', random (p = 0.1) by random tokens"
    )
    assert lines["text"] == "made-up text at revision abc123abc123, 150 documents, in windows of 10 tokens"
    assert lines["rows"] == "128 to train on + 22 held out, of each variant"
    assert lines["shards"] == (
        "3 of 64 rows: 0 there, 3 missing; this process is 1/2 (RANK and WORLD_SIZE) and begins with 1 of them"
    )
    assert lines["time"] == "expected time 42 min 40 s at 0.100 tokens/s on cuda:1"  # 64 rows in 4 variants
    assert "5.00 TB free" in lines["disk"]
    assert lines["cache"] == str(tmp_path)


def test_a_process_without_a_missing_shard_says_that_the_rest_is_for_others(tmp_path, capsys):
    plan, share = make_plan(), Share(index=7, count=8, source="--shard")
    lines = printed(capsys, plan, tmp_path, forecast(plan, tmp_path, [0, 1, 2], share, 10.0), share)
    assert lines["time"] == "nothing left to do for this process"
    assert "makes 0 of them" in lines["shards"]


def test_a_time_that_was_not_measured_is_not_invented(tmp_path, capsys):
    plan = make_plan()
    assert "not measured" in printed(capsys, plan, tmp_path, forecast(plan, tmp_path, [0], ALONE, None))["time"]


def test_the_paper_s_cache_is_announced_to_one_percent(tmp_path, capsys):
    """100 M tokens of d = 2304, clean and masked: 100e6 x 2304 x 2 bytes x 2 variants = 0.92 TB."""
    plan = make_plan(n_rows=100_000_000, shard_rows=65536, chunk_rows=1024)
    windows = {"window_tokens": 1024, "n_train_windows": 92774, "n_held_out_windows": 4883}
    plan = replace(plan, hooks=(make_hook(12, 2304),), **windows)
    said = printed(capsys, plan, tmp_path, forecast(plan, tmp_path, range(plan.n_shards), ALONE, None))["disk"]
    assert float(said.split(" TB needed")[0]) == pytest.approx(100e6 * 2304 * 2 * 2 / 1e12, rel=0.01)


def test_a_disk_that_is_too_small_is_refused_with_the_sizes(tmp_path, monkeypatch, capsys):
    plan = make_plan()
    needed = forecast(plan, tmp_path, [0, 1, 2], ALONE, None).bytes_needed
    free_bytes(monkeypatch, needed)
    refuse_if_full(tmp_path, forecast(plan, tmp_path, [0, 1, 2], ALONE, None))
    free_bytes(monkeypatch, needed - 1500)
    ahead = forecast(plan, tmp_path, [0, 1, 2], ALONE, None)
    assert "free (1.50 kB are missing), " in printed(capsys, plan, tmp_path, ahead)["disk"]
    with pytest.raises(DiskFull, match=r"more and the disk has .* free, so 1\.50 kB are missing; make room") as caught:
        refuse_if_full(tmp_path, ahead)
    assert "--tokens" in str(caught.value)
    assert caught.value.exit_code == 1
    refuse_if_full(tmp_path, forecast(plan, tmp_path, [0], ALONE, None))  # a resume needs less


def test_a_machine_with_too_little_memory_is_refused(tmp_path, monkeypatch):
    plan = make_plan()
    ahead = forecast(plan, tmp_path, [0, 1, 2], ALONE, None)
    two_shards = 2 * 64 * 6 * 2 * 2  # of fp16 rows, clean and masked
    assert ahead.bytes_memory == two_shards + 8 * plan.window_tokens * 2 * plan.n_rows
    pages = {"SC_PHYS_PAGES": ahead.bytes_memory, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    refuse_if_full(tmp_path, ahead)
    pages["SC_PHYS_PAGES"] -= 1
    with pytest.raises(UserError, match=r"in memory \(two shards, .*\) and the machine has"):
        refuse_if_full(tmp_path, ahead)


@given(st.integers(0, 10**16))
@example(999_499)
@example(999_500)
@example(99_950_000_000)
@example(999_500_000_000_000)
def test_a_size_is_right_to_one_percent(n_bytes):
    number, unit = size(n_bytes).split(" ")
    factor = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(number.replace(",", "")) * factor == pytest.approx(n_bytes, rel=0.005)
    assert (
        len(number.replace(",", "").replace(".", "").lstrip("0")) <= 3 or n_bytes >= 999_500_000_000_000
    )  # no unit above TB
    assert "e" not in number


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.50 kB"),
        (999_600, "1.00 MB"),
        (12_340_000, "12.3 MB"),
        (99 * 10**9, "99.0 GB"),
        (921_600_000_000, "0.922 TB"),
        (1_000_000_000_000, "1.00 TB"),
        (4_050_000_000_000, "4.05 TB"),
        (1_234_567_000_000_000, "1,230 TB"),
    ],
)
def test_sizes_have_three_digits(n_bytes, said):
    assert size(n_bytes) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.3, "less than 1 s"),
        (45.2, "45 s"),
        (59.7, "1 min 0 s"),
        (90, "1 min 30 s"),
        (12_000, "3 h 20 min"),
        (86_400, "1 day 0 h"),
        (187_000, "2 days 4 h"),
        (86_399, "24 h 0 min"),
    ],
)
def test_times_have_two_units(seconds, said):
    assert duration(seconds) == said


@given(st.floats(1, 10**8))
def test_a_time_is_right_to_half_of_its_smaller_unit(seconds):
    parts = duration(seconds).split(" ")
    factors = {"s": 1, "min": 60, "h": 3600, "day": 86400, "days": 86400}
    total = sum(int(n.replace(",", "")) * factors[unit] for n, unit in zip(parts[::2], parts[1::2], strict=True))
    assert abs(total - seconds) <= factors[parts[-1]] / 2 + 1e-6
