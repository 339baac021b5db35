"""The page and its pictures: self-contained, escaped, and every mark where its value says."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate import figures, wording
from evaluate.command import choose_metrics, write_reports
from evaluate.compare import ORACLE, Recipe, Result, by_recipe, differences, summaries
from evaluate.example import Bar, Example
from evaluate.measuring import DENSITY_BINS, Measured
from evaluate.names import available, find
from evaluate.report import overall_report

EVIL = "masked 0.5 <script>alert('x')</script> & \"co\""


def recipe(name: str, arch: str = "batchtopk", **facts: Any) -> Recipe:
    plain = Recipe(bench="tiny", arch=arch, k=6, d_sae=512, name=name, is_plain=name == "unmasked")
    return replace(plain, is_masked=name.startswith("masked"), **facts)


@pytest.fixture
def measured():
    """Three recipes of two architectures with three seeds, an oracle, and a number in every column."""
    rng = np.random.default_rng(0)
    columns = [name for metric in choose_metrics("") for name in metric.columns]
    found = Measured()
    for arch in ("batchtopk", "matryoshka"):
        for name in ("unmasked", EVIL, "gaussian 0.4"):
            for seed in range(3):
                values = {column: float(value) for column, value in zip(columns, rng.random(len(columns)), strict=True)}
                found.results.append(
                    Result(run=f"{arch} {name} {seed}", recipe=recipe(name, arch), seed=seed, values=values)
                )
            found.densities[recipe(name, arch)] = [rng.integers(0, 30, len(DENSITY_BINS) - 1)]
    oracle = recipe(ORACLE, "", kind=ORACLE)
    found.results.append(Result(run=ORACLE, recipe=oracle, seed=0, values={"mcc": 1.0, "delta_ce": float("nan")}))
    found.densities[oracle] = [np.zeros(len(DENSITY_BINS) - 1)]
    bar = Bar(child="lifelt <b>", n=10, firing=0.25, absorbed=0.4, absorber="latent 3 (kind place, F1 0.15)")
    found.examples.append(
        Example(
            recipe=recipe("unmasked"),
            seed=0,
            family="two_token",
            parent="letter l",
            latents=(4, 9),
            bars=(bar,),
        )
    )
    found.missing.append("columns of <something> are missing")
    return found


class Balance(HTMLParser):
    """Checks that every opened tag is closed in order."""

    VOID = ("meta", "br", "line", "circle", "rect", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped(measured, tmp_path, capsys):
    write_reports(measured, choose_metrics(""), tmp_path)
    page = (tmp_path / "report.html").read_text()
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not {"script", "link", "iframe"} & set(balance.seen)
    assert not re.search(r"https?:|src=|@import|url\(", page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "columns of &lt;something&gt; are missing" in page
    assert "lifelt &lt;b&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(str((tmp_path / "report.html").resolve()))
    assert "paired comparisons were made" in printed


def test_the_verdict_comes_first(measured, tmp_path):
    write_reports(measured, choose_metrics(""), tmp_path)
    page = (tmp_path / "report.html").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sentence"].startswith("Over 3 seeds, 'masked 0.5")
    assert page.index('class="sentence"') < page.index("<h2>")


def test_report_json_is_strict_and_says_everything(measured, tmp_path):
    write_reports(measured, choose_metrics(""), tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    report = json.loads(text)
    assert len(report["runs"]) == 19
    assert (
        report["n_comparisons"]
        == len(report["differences"])
        == 4 * len({difference["column"] for difference in report["differences"]})
    )
    assert report["missing"] == ["columns of <something> are missing"]
    oracle = next(run for run in report["runs"] if run["kind"] == ORACLE)
    assert oracle["metrics"] == {"mcc": 1.0, "delta_ce": None}
    assert {difference["baseline"]["recipe"] for difference in report["differences"]} == {"unmasked"}


def test_a_page_of_core_numbers_alone_has_no_empty_pictures(measured, tmp_path):
    core = Measured(
        results=[
            Result(run=r.run, recipe=r.recipe, seed=r.seed, values={"l0": 6.0, "explained_variance": 0.9})
            for r in measured.results
        ],
        densities=measured.densities,
    )
    write_reports(core, choose_metrics("core"), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Recipes" in page
    for absent in ("worked example", "Probing on the usual", "seed by seed", "Reconstruction against"):
        assert absent not in page


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_scale_holds_all_its_values_and_its_ticks(values):
    scale = figures.Scale.around(values)
    places = [scale.place(value) for value in values]
    assert all(0 < place < 100 for place in places)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(0 <= place <= 100 for place, _ in ticks)
    assert [place for place, _ in ticks] == sorted(place for place, _ in ticks)


def test_a_scale_of_a_run_that_diverged_has_ticks_too():
    assert figures.Scale.around([-1e34, 0.9]).ticks()


def test_marks_of_the_forest_lie_where_the_interval_lies(measured):
    changes = differences(measured.results, ["explained_variance"])
    tables = summaries(measured.results)
    columns = find("core").columns
    (chart,) = figures.forest(changes, columns, wording.labels(tables), figures.colours(tables))
    assert chart.zero == 50.0
    for strip, change in zip(chart.strips, changes, strict=True):
        assert strip.span is not None
        assert strip.mean is not None
        low, high = strip.span
        assert low < strip.mean < high
        assert strip.clear == (high < 50 or low > 50)
        assert (strip.mean > 50) == (change.mean > 0)


def test_two_seeds_cannot_blow_up_the_scale():
    wide = [
        Result(run="", recipe=recipe(n), seed=s, values={"mse": v})
        for n, s, v in [("unmasked", 0, 1.0), ("unmasked", 1, 1.0), ("masked", 0, 1.1), ("masked", 1, 1.3)]
    ]
    changes = differences(wide, ["mse"])
    tables = summaries(wide)
    columns = {"mse": find("core").columns["mse"]}
    (chart,) = figures.forest(changes, columns, wording.labels(tables), figures.colours(tables))
    assert chart.strips[0].mean is not None
    assert chart.strips[0].mean > 60
    assert chart.strips[0].span == (0.0, 100.0)  # held inside the strip


def test_dots_of_a_recipe_are_its_seeds(measured):
    tables = summaries(measured.results)
    named, hue = wording.labels(tables), figures.colours(tables)
    chart = figures.dot_plot("t", "n", "mcc", by_recipe(measured.results), named, hue)
    assert chart is not None
    assert [len(strip.dots) for strip in chart.strips] == [3] * 6 + [1]
    assert figures.dot_plot("t", "n", "nothing", by_recipe(measured.results), named, hue) is None


def test_one_recipe_keeps_its_colour_in_every_architecture(measured):
    hue = figures.colours(summaries(measured.results))
    by_name = {}
    for each, colour in hue.items():
        by_name.setdefault((each.kind, each.name), set()).add(colour)
    assert all(len(found) == 1 for found in by_name.values())
    assert by_name[(ORACLE, ORACLE)] == {-1}


def test_probe_bars_end_with_the_dense_probe(measured):
    tables = summaries(measured.results)
    bars = figures.probe_bars(1, tables, wording.labels(tables), figures.colours(tables))
    assert len(bars) == 7
    assert bars[-1].label.startswith("dense probe")
    auc = tables[recipe("unmasked")]["sae_top_1_test_auc"].mean
    assert bars[0].usual == (figures.Scale(low=0.5, high=1.0).place(auc), wording.number(auc))


def test_histograms_count_the_latents_that_never_fire(measured):
    tables = summaries(measured.results)
    found = figures.histograms(measured.densities, wording.labels(tables), figures.colours(tables))
    assert len(found) == 6
    n_alive = int(measured.densities[recipe("unmasked")][0].sum())
    assert found[0].n_dead == f"{512 - n_alive} of 512 never fire"
    assert max(height for histogram in found for height in histogram.heights) == 100.0


def test_every_metric_says_what_its_columns_mean():
    assert available() == ["absorption", "core", "ood", "probing", "recovery"]
    names: list[str] = []
    for metric in choose_metrics(""):
        for name, column in metric.columns.items():
            assert len(column.meaning) > 10, name
            assert column.better in ("", "higher", "lower")
            names.append(name)
        assert metric.measure.__doc__
    assert len(names) == len(set(names))


def test_the_report_over_nothing_compared_is_valid_json(measured):
    report = overall_report(sentence="s", results=[], tables={}, differences=[], unreliable={}, columns={}, missing=[])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
