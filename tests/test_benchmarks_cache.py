"""The benchmark of the cache format runs, at a size of no interest."""

import re

from typer.testing import CliRunner

from benchmarks.cache import app


def test_every_line_of_the_table_has_a_figure():
    done = CliRunner().invoke(app, ["--d-model", "8", "--rows", "1024", "--shards", "3"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == 6
    assert all(re.search(r" [\d.]+ (GB/s|s)$", line) for line in lines)
