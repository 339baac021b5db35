"""report.json: strict JSON that says everything, in one order, with SAEBench's names; and nothing lost on the way."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from evaluate_fixtures import planted_language, planted_sae, subject_of_sae
from page_fixtures import COLUMNS, planted

from evaluate import command
from evaluate.cases import Case
from evaluate.command import choose_metrics, columns_of, write_reports
from evaluate.compare import Comparison, compare
from evaluate.example import recall_example
from evaluate.names import Metric
from evaluate.recipes import ORACLE, Measured, Recipe
from evaluate.report import case_report, measurement, overall_report, result_of
from evaluate.subject import Subject


@pytest.fixture
def measured(tmp_path) -> Measured:
    """Two recipes of two architectures with three seeds, all controls, and a number in every column."""
    found = planted(archs=("batchtopk", "matryoshka"), logs=tmp_path / "runs")
    found.results[0] = replace(found.results[0], values={**found.results[0].values, "mse": math.nan})
    return found


ALL = {**COLUMNS, "mse": COLUMNS["delta_ce"]}


def overall(measured: Measured, folder: Path) -> dict:
    comparison = compare(measured.results, ALL)
    return overall_report(sentence="s", measured=measured, comparison=comparison, columns=ALL, folder=folder)


def test_it_is_strict_json_and_says_everything(measured, tmp_path):
    report = overall(measured, tmp_path / "runs")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    comparison = compare(measured.results, ALL)
    assert len(report["runs"]) == len(measured.results)
    assert len(report["recipes"]) == len(comparison.tables)
    assert len(report["differences"]) == len(comparison.differences)
    assert report["families"] == comparison.families
    assert report["n_comparisons"] == sum(comparison.families.values()) > 0
    assert report["missing"] == measured.missing
    assert report["left_out"] == measured.left_out
    assert report["cautions"] == comparison.cautions != []
    assert len(report["pairs"]) == len(comparison.power_notes) == 2
    assert report["runs"][0]["metrics"]["mse"] is None
    assert set(report["runs"][0]["profiles"]) == {"density_histogram", "jaccard_histogram"}
    oracle = next(run for run in report["runs"] if run["kind"] == ORACLE)
    assert oracle["metrics"]["delta_ce"] is None
    assert {difference["baseline"]["recipe"] for difference in report["differences"]} == {"unmasked"}
    for name, column in report["columns"].items():
        assert column["meaning"], name


def test_a_difference_carries_its_test_and_its_verdict(measured, tmp_path):
    reported = overall(measured, tmp_path)["differences"]
    for difference, found in zip(compare(measured.results, ALL).differences, reported, strict=True):
        assert found["interval_95"] == [difference.low, difference.high]
        assert (found["p"], found["p_holm"], found["n_family"]) == (
            difference.p,
            difference.p_holm,
            difference.n_family,
        )
        assert (found["seeds_needed"], found["verdict"]) == (difference.seeds_needed, difference.verdict)
        assert (found["l0_matched"], found["family"]) == (
            True,
            "claim" if COLUMNS[difference.column].claim else "other",
        )


def test_the_order_of_the_results_does_not_change_tables_and_differences(measured, tmp_path):
    there = overall(measured, tmp_path)
    back = overall(replace(measured, results=measured.results[::-1]), tmp_path)
    for part in ("recipes", "differences", "pairs", "unreliable", "cautions"):
        assert json.dumps(there[part]) == json.dumps(back[part])


def test_paths_are_relative_to_the_report(measured, tmp_path):
    report = overall(measured, tmp_path / "other")
    paths = {run["path"] for run in report["runs"] if run["path"]}
    assert all(path.startswith("../runs/batchtopk") or path.startswith("../runs/matryoshka") for path in paths)
    assert str(tmp_path) not in json.dumps(report)


def test_a_report_over_nothing_is_valid_json(tmp_path):
    report = overall_report(sentence="s", measured=Measured(), comparison=Comparison(), columns={}, folder=tmp_path)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_command_writes_both_and_prints_the_place_of_the_page(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "columns_of", lambda _: ALL)
    write_reports(measured, [], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sentence"] in capsys.readouterr().out
    write_reports(measured, [], tmp_path / "alone", with_json=False)
    assert not (tmp_path / "alone" / "report.json").exists()
    assert capsys.readouterr().out.rstrip().endswith(str((tmp_path / "alone" / "report.html").resolve()))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of_sae(planted_sae(4), planted_language(n=2000))


def case_of(subject: Subject) -> Case:
    recipe = Recipe(bench="b", arch="batchtopk", k=6, d_sae=512, name="unmasked", is_plain=True)
    return Case(name="one", recipe=recipe, seed=3, make=lambda: subject, report=Path("report.json"), facts={})


def test_a_measurement_comes_back_from_json_as_it_was(subject):
    numbers = {
        "l0": 1.0,
        "explained_variance": 0.1 + 0.2,
        "mse": math.nan,
        "auc@topic": 1 / 3,
        "density": [1.0, math.nan],
    }
    example = recall_example(subject)
    found = measurement(subject, {"core": numbers}, 1 / 7, example, ["nothing"])
    back = json.loads(json.dumps(case_report(case_of(subject), found, "mark"), allow_nan=False))
    assert (back["run"], back["seed"], back["fingerprint"], back["missing"]) == ("one", 3, "mark", ["nothing"])
    result = result_of(case_of(subject), back)
    assert result.values.keys() == {"l0", "explained_variance", "mse", "auc@topic"}
    assert result.values["explained_variance"] == 0.1 + 0.2
    assert result.values["auc@topic"] == 1 / 3
    assert math.isnan(result.values["mse"])
    assert result.profiles["density"][0] == 1.0
    assert math.isnan(result.profiles["density"][1])
    assert result.example == example
    assert back["eval_result_metrics"] == {
        "reconstruction_quality": {"explained_variance": 0.1 + 0.2, "mse": None},
        "sparsity": {"l0": 1.0},
    }
    assert back["threshold"] == {"trained": 0.5, "matched": 0.5}


def test_every_metric_says_what_its_columns_mean():
    names: list[str] = []
    for metric in choose_metrics(""):
        assert isinstance(metric, Metric)
        for name, column in metric.columns.items():
            assert len(column.meaning) > 10, name
            assert column.better in ("", "higher", "lower")
            names.append(name)
        assert metric.measure.__doc__
    assert len(names) == len(set(names))
    assert columns_of(choose_metrics("stability")).keys() >= {"l0", "stability"}
