"""The benchmark of the two kernels at toy size: its rows are its grid, and it says where auto is wrong."""

import re

import pytest
from typer.testing import CliRunner

from benchmarks import crossover
from benchmarks.crossover import Duel, jobs, numbers, whole_numbers
from benchmarks.jobs import make_job
from cache_spec.errors import UserError


def test_every_shape_of_the_grid_has_a_row_but_those_that_are_left_out():
    sizes = ["--arch", "topk", "--d-model", "8,16", "--d-sae", "64", "--density", "0.05,0.5", "--batch", "16"]
    done = CliRunner().invoke(crossover.app, [*sizes, "--threads", "1", "--rounds", "1", "--limit", "1e4"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith("topk ")]
    assert [(row[3], row[5], row[-2] if row[-1] == "!" else row[-1]) for row in rows] == [
        ("8", "3", "sparse"),
        ("8", "32", "dense"),
    ]
    assert re.search(r"auto took the slower kernel at \d of 2 shapes", done.output)
    for row in rows:
        assert float(row[10]) == pytest.approx(float(row[8]) / float(row[9]), rel=0.2)


def test_auto_is_wrong_where_the_quartiles_say_so():
    job = make_job("topk", "64,512,5,128", "fp32", "cpu")  # 1 %: sparse
    assert Duel(job, [1.0, 1.1, 1.2], [2.0, 2.0, 2.0]).is_wrong
    assert not Duel(job, [1.0, 2.1, 3.0], [2.0, 2.0, 2.0]).is_wrong
    dense = make_job("topk", "64,512,100,128", "fp32", "cpu")
    assert Duel(dense, [3.0, 3.0, 3.0], [2.0, 2.0, 2.0]).is_wrong
    assert not Duel(dense, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]).is_wrong


def test_a_density_below_one_latent_has_no_job():
    assert [job.k for job in jobs(["topk"], [8], [64, 1024], [0.001, 0.1], [16])] == [6, 1, 102]


def test_lists_are_read():
    assert numbers("--density", "0.5,1") == [0.5, 1.0]
    assert whole_numbers("--batch", "2, 4") == [2, 4]
    for text in ("x", "0", "-1", ""):
        with pytest.raises(UserError, match="--batch is"):
            whole_numbers("--batch", text)
    with pytest.raises(UserError, match="give whole numbers"):
        whole_numbers("--batch", "1.5")
