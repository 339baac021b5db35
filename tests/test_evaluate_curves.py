"""Training curves: thinned logs, means over seeds, and logs that cannot be read."""

import json
from dataclasses import replace

import numpy as np
import pytest
from page_fixtures import planted, recipe, result_of, write_log

from evaluate import curves, frontier
from evaluate.series import looks


def log_of(tokens, values, key="loss"):
    empty = {name: np.full(len(tokens), np.nan) for name in curves.QUANTITIES}
    return {**empty, "tokens": np.array(tokens, dtype=float), key: np.array(values, dtype=float)}


def test_a_long_log_is_thinned_evenly_and_keeps_its_ends(tmp_path):
    path = write_log(tmp_path, recipe("unmasked"), 0, n_lines=1000)
    log = curves.read_log(path)
    assert log is not None
    assert len(log["tokens"]) == curves.MAX_POINTS
    assert (log["tokens"][0], log["tokens"][-1]) == (4000, 4_000_000)
    steps = np.diff(log["tokens"])
    assert steps.max() - steps.min() <= 4000
    assert np.isnan(log["explained_variance"][0])  # the log says null


def test_a_short_log_is_whole(tmp_path):
    log = curves.read_log(write_log(tmp_path, recipe("unmasked"), 0, n_lines=7))
    assert log is not None
    assert log["tokens"].tolist() == [4000 * i for i in range(1, 8)]
    lines = [json.loads(line) for line in (next(tmp_path.iterdir()) / "log.jsonl").read_text().splitlines()]
    assert log["loss"].tolist() == [line["loss"] for line in lines]


@pytest.mark.parametrize("text", ["", "not json\n" * 3, "3\n4\n", '{"tokens": "many"}\n{"tokens": 1}\n', "\x00\n"])
def test_a_log_that_cannot_be_read_is_named(tmp_path, text):
    good, bad = (write_log(tmp_path, recipe("unmasked"), seed) for seed in (0, 1))
    (bad / "log.jsonl").write_text(text)
    results = [result_of(recipe("unmasked"), seed, path=path) for seed, path in enumerate((good, bad))]
    logs, unread = curves.read_logs(results)
    assert unread == [results[1].run]
    assert [len(found) for found in logs.values()] == [1]


def test_a_missing_log_is_named_and_a_control_has_none(tmp_path):
    results = [result_of(recipe("unmasked"), 0, path=tmp_path / "gone"), result_of(recipe("masked 0.5"), 0)]
    assert curves.read_logs(results) == ({}, [results[0].run])


def test_the_mean_over_seeds_of_equal_steps_is_the_plain_mean():
    tokens = [0, 10, 20]
    grid, mean = curves.mean_curve([log_of(tokens, [1, 2, 3]), log_of(tokens, [3, 4, 8])], "loss")
    assert grid.tolist() == tokens
    assert mean.tolist() == [2, 3, 5.5]


def test_seeds_that_log_at_other_steps_are_taken_between_their_own_where_all_have_some():
    grid, mean = curves.mean_curve([log_of([0, 10, 20, 30], [0, 1, 2, 3]), log_of([5, 15, 25], [0, 0, 0])], "loss")
    assert grid.tolist() == [10, 20]
    assert mean.tolist() == [0.5, 1.0]


def test_a_quantity_that_no_log_has_gives_no_curve():
    assert len(curves.mean_curve([log_of([0, 1], [1, 2])], "l0")[0]) == 0
    logs = {recipe("unmasked"): [log_of([0, 1], [1, 2])]}
    assert curves.curves("l0", logs, looks(logs)) is None
    assert curves.curves("loss", logs, looks(logs)) is not None


def test_curves_lie_inside_their_panel_and_leave_out_what_is_off_the_scale():
    tokens = np.arange(1, 101) * 10
    values = np.where(tokens <= 50, 1e6, np.linspace(2, 1, 100))  # the beginning is wild
    logs = {recipe("unmasked"): [log_of(tokens, values)]}
    figure = curves.curves("loss", logs, looks(logs))
    assert figure is not None
    (line,) = figure.panels[0].lines
    points = [tuple(map(float, pair.split(","))) for pair in line.path.removeprefix("M").split("L")]
    assert 90 <= len(points) <= 95
    xs = [x for x, _ in points]
    assert xs == sorted(xs)
    assert all(frontier.LEFT <= x <= frontier.RIGHT and frontier.TOP <= y <= frontier.BOTTOM for x, y in points)
    assert figure.panels[0].text.endswith("unmasked 1.000")


def test_there_is_a_panel_for_each_architecture_and_k_on_one_scale(tmp_path):
    measured = planted(archs=("batchtopk", "topk"), ks=(3, 6), n_seeds=2, logs=tmp_path)
    logs, unread = curves.read_logs(measured.results)
    assert unread == []
    figure = curves.curves("explained_variance", logs, looks(logs))
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["batchtopk k 3", "batchtopk k 6", "topk k 3", "topk k 6"]
    assert len({(panel.x_ticks, panel.y_ticks) for panel in figure.panels}) == 1
    assert [line.look.label for line in figure.panels[0].lines] == ["unmasked", "masked 0.5"]


def test_a_run_without_a_path_draws_nothing():
    measured = planted(n_seeds=1)
    assert curves.read_logs([replace(result, path=None) for result in measured.results]) == ({}, [])
