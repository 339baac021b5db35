"""The evaluation benchmark at toy size: it runs, and its table is made of what it says."""

import re

import numpy as np
from evaluate_fixtures import no_model, small_cache, small_sae, write_run
from typer.testing import CliRunner

from benchmarks import evaluate as benchmark


def test_the_table_has_a_ratio_for_each_round_and_their_median(tmp_path, monkeypatch):
    no_model(monkeypatch)
    cache = small_cache(tmp_path / "cache")
    for seed in range(12):
        write_run(tmp_path / "runs", cache, small_sae(seed), seed=seed)
    real, sizes = benchmark.minutes, []

    def counted(runs, *options):
        sizes.append(len(runs))
        return real(runs, *options) + len(runs)

    monkeypatch.setattr(benchmark, "minutes", counted)
    options = ["--runs", str(tmp_path / "runs"), "--metrics", "core", "--rounds", "3"]
    done = CliRunner().invoke(benchmark.app, options)
    assert done.exit_code == 0, done.output
    assert sizes == [1, 12, 12, 1, 1, 12]
    rows = np.array([line.split()[1:] for line in done.output.splitlines() if re.match(r"\d ", line)], dtype=float)
    one, many, ratio = rows.T
    np.testing.assert_allclose(many / one, ratio, rtol=0.02)
    (median,) = re.findall(r"^median +([\d.]+)", done.output, re.MULTILINE)
    assert float(median) == np.median(ratio)
    assert "NOT met" in done.output
    assert not list((tmp_path / "runs").glob("*/report.json"))


def test_too_few_runs_are_said(tmp_path):
    write_run(tmp_path / "runs", small_cache(tmp_path / "cache"), small_sae(0))
    done = CliRunner().invoke(benchmark.app, ["--runs", str(tmp_path / "runs")])
    assert "there are 1 finished runs and 12 are wanted" in str(done.exception)
