"""The benchmark of the feature pages at toy size: it runs, and its numbers are those of a site."""

import re

import pytest
from typer.testing import CliRunner

from benchmarks import features as benchmark


def test_the_table_says_the_size_of_a_site_in_which_every_latent_has_its_examples(monkeypatch):
    monkeypatch.setattr(benchmark, "SHARD_ROWS", 2048)
    options = ["--latents", "32", "--d-model", "8", "--rows", "4096", "--k", "4", "--examples", "3"]
    done = CliRunner().invoke(benchmark.app, options)
    assert done.exit_code == 0, done.output
    ((examples, megabytes, each),) = re.findall(
        r"of ([\d.]+) examples each\nsite +([\d.]+) MB, ([\d,]+) bytes", done.output
    )
    assert 10 < float(examples) <= 3 + 15
    assert float(each.replace(",", "")) * 32 == pytest.approx(float(megabytes) * 1e6, rel=0.3)
