"""The benchmarks of sweeps and of the whole command at toy size: they run, and their tables are what they measured."""

import re

import pytest
from typer.testing import CliRunner

from benchmarks import end_to_end, sweep
from benchmarks.jobs import make_job
from benchmarks.loader import make_cache
from benchmarks.sweep import N_SHARDS, new_runs, open_loader, parse_sizes, train
from cache_spec.errors import UserError

TINY = ["--shape", "16,64,4,32", "--shard-rows", "1024", "--rounds", "1"]


def test_the_sweep_has_a_row_for_each_number_of_saes():
    done = CliRunner().invoke(sweep.app, [*TINY, "--saes", "2,3", "--steps", "2", "--kernel", "dense"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if re.match(r" +\d ", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][3] == "1.00"
    for n, whole, each, *_ in rows:
        assert float(whole) / int(n) == pytest.approx(float(each), abs=0.1)


def test_all_saes_of_a_stretch_see_the_same_rows_and_go_on_from_where_they_are(tmp_path):
    job = make_job("batchtopk", "16,64,4,32", "fp32", "cpu")
    loader = open_loader(make_cache(tmp_path / "cache", 16, 1024, N_SHARDS), job)
    runs = new_runs(loader, job, "dense", 2)
    first = runs[0].sae.W_dec.clone()
    stretch = train(loader, runs, 3)
    assert [run.n_done for run in runs] == [4, 4]  # the first is not counted
    assert not first.equal(runs[0].sae.W_dec)
    assert not runs[0].sae.W_dec.equal(runs[1].sae.W_dec)
    assert stretch.seconds > stretch.waiting >= 0
    train(loader, runs, 1)
    assert [run.n_done for run in runs] == [6, 6]


def test_numbers_of_saes_are_read():
    assert parse_sizes("8,2,2") == [1, 2, 8]
    with pytest.raises(UserError, match="--saes is '2,x'"):
        parse_sizes("2,x")


def test_the_whole_command_is_beside_the_step_and_the_loop():
    done = CliRunner().invoke(end_to_end.app, [*TINY, "--kernel", "dense", "--steps", "20"])
    assert done.exit_code == 0, done.output
    found = re.findall(r"^dense: (.+?) {2,}([\d,]+) +([\d.]+)", done.output, re.MULTILINE)
    assert [what for what, _, _ in found] == ["step alone", "step and loader", "whole command"]
    rates = [float(rate.replace(",", "")) for _, rate, _ in found]
    for rate, (_, _, share) in zip(rates, found, strict=True):
        assert rate / rates[0] == pytest.approx(float(share), abs=0.01)
    assert rates[2] < rates[0]


def test_a_command_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end.sys, "executable", "false")
    with pytest.raises(UserError, match="python -m train ended with code 1"):
        end_to_end.command_seconds(tmp_path / "nothing", tmp_path / "out", ["--arch", "topk", "--device", "cpu"])
