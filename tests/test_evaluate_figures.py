"""The pictures: every mark where its value says, on scales that all panels of a figure share."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_fixtures import COLUMNS, EIGHT, compared, planted, recipe

from evaluate import figures, frontier, histograms
from evaluate.cofiring import HISTOGRAM_EDGES
from evaluate.recipes import MATCHED, ORACLE, RANDOM, Recipe, by_recipe
from evaluate.scale import Scale, thousands
from evaluate.series import CONTROL, LEARNED, looks, panels, several
from evaluate.statistics import Estimate
from evaluate.wording import number

NAMES = ("unmasked", "masked 0.5", "gaussian (matched 0.5)", "small")


@pytest.fixture(scope="module")
def grid():
    """(results, comparison, looks) of two architectures, two k and three seeds."""
    measured = planted(NAMES, ("batchtopk", "matryoshka"), (3, 6), 3)
    comparison = compared(measured)
    return measured, comparison, looks(comparison.tables)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_scale_holds_all_its_values_and_its_ticks(values):
    scale = Scale.around(values)
    assert all(0 < scale.place(value) < 100 for value in values)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(0 <= place <= 100 for place, _ in ticks)
    assert [place for place, _ in ticks] == sorted(place for place, _ in ticks)


@given(st.lists(st.floats(0.5, 5000), min_size=2, max_size=8, unique=True))
@settings(max_examples=100, deadline=None)
def test_a_scale_for_l0_is_monotone_and_by_powers_of_ten_only_where_it_is_wide(values):
    scale = Scale.across(values)
    assert scale.is_log is (max(values) / min(values) >= 3)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert 0 < places[0] <= places[-1] < 100
    ticks = scale.ticks()
    assert all(0 <= place <= 100 for place, _ in ticks)
    assert [place for place, _ in ticks] == sorted(place for place, _ in ticks)


def test_equal_factors_are_equally_far_apart_on_a_scale_by_powers_of_ten():
    scale = Scale(low=1.0, high=1000.0, is_log=True)
    assert [scale.place(value) for value in (0.1, 1, 10, 100, 1000, 1e4)] == [0, 0, 33.33, 66.67, 100, 100]
    assert scale.ticks() == [(0.0, "1"), (33.33, "10"), (66.67, "100"), (100.0, "1000")]
    assert [text for _, text in Scale(low=1e-5, high=0.1, is_log=True).ticks()][:2] == ["10⁻⁵", "10⁻⁴"]


def test_a_scale_of_a_run_that_diverged_has_ticks_too():
    assert Scale.around([-1e34, 0.9]).ticks()


def test_counts_are_short():
    assert [thousands(value) for value in (7, 512, 49_152, 2_500_000, 3e9)] == ["7", "512", "49.2k", "2.5M", "3B"]
    assert [text for _, text in Scale(low=0, high=5e5).ticks()][:2] == ["0", "100k"]


def test_a_treatment_looks_the_same_everywhere_and_unlike_any_other(grid):
    look = grid[2]
    by_label = {}
    for each, found in look.items():
        by_label.setdefault((each.kind in LEARNED, found.label), set()).add(found)
    assert all(len(found) == 1 for found in by_label.values())
    learned = [found for (is_learned, _), (found,) in by_label.items() if is_learned]
    assert len({found.shape for found in learned}) == len({found.colour for found in learned}) == 4
    assert {found.dash for found in learned if "masked 0.5" in found.label or found.label == "unmasked"} == {""}
    assert look[recipe("gaussian (matched 0.5)", "batchtopk", 3)].dash == "dashed"
    assert look[recipe("small", "batchtopk", 3)].dash == "dashed"
    controls = [found for each, found in look.items() if each.kind not in LEARNED]
    assert {(found.colour, found.dash) for found in controls} == {(CONTROL, "dotted")}


def test_eight_recipes_have_eight_colours_and_eight_marks():
    look = looks([recipe(name) for name in EIGHT])
    assert len({found.colour for found in look.values()}) == len({found.shape for found in look.values()}) == 8


def test_panels_hold_every_recipe_of_an_architecture_with_its_controls_last():
    recipes = [recipe(name, arch, k) for k in (6, 3) for arch in ("topk", "batchtopk") for name in NAMES]
    both = replace(recipe(RANDOM, "batchtopk, topk", 3), kind=RANDOM, is_plain=False)
    oracle = Recipe(bench=both.bench, arch="", k=0, d_sae=9, name=ORACLE, kind=ORACLE)
    found = panels([oracle, both, *recipes])
    assert list(found) == ["topk", "batchtopk"]
    assert [(each.name, each.k) for each in found["topk"][:4]] == [
        ("unmasked", 3),
        ("unmasked", 6),
        ("masked 0.5", 3),
        ("masked 0.5", 6),
    ]
    assert all(group[-1] == both and oracle not in group for group in found.values())
    assert list(panels([*recipes, both], by_k=True)) == ["topk k 6", "batchtopk k 6", "topk k 3", "batchtopk k 3"]
    assert list(panels([recipe("unmasked"), recipe("unmasked", bench="b")])) == [
        "batchtopk (tiny, resid_post.2)",
        "batchtopk (b)",
    ]
    assert several(recipes)
    assert not several([recipe("unmasked", k=3), recipe("unmasked", "topk", k=6)])


def test_a_line_goes_through_the_means_and_error_bars_hold_them(grid):
    _, comparison, look = grid
    figure = frontier.across_l0("full_absorption_cross_token", comparison.tables, COLUMNS, look)
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["batchtopk", "matryoshka"]
    assert figure.panels[0].y_ticks == figure.panels[1].y_ticks
    for panel in figure.panels:
        assert panel.references[0][1] == "oracle"
        heights = {}
        for line in panel.lines:
            xs = [point.x for point in line.points]
            assert xs == sorted(xs)
            assert len(xs) == 2
            assert line.path == frontier.path_of([(point.x, point.y) for point in line.points])
            for k, point in zip((3, 6), line.points, strict=True):
                assert point.low is not None
                assert point.high is not None
                assert point.high <= point.y <= point.low  # y grows downward
                assert frontier.TOP <= point.high <= point.low <= frontier.BOTTOM
                assert frontier.LEFT <= point.x <= frontier.RIGHT
                heights[line.look.label, k] = point.y
        means = {
            (look[each].label, each.k): table["full_absorption_cross_token"].mean
            for each, table in comparison.tables.items()
            if each.arch == panel.title
        }
        assert heights.keys() == means.keys()
        order = sorted(means, key=lambda key: -means[key])
        assert sorted(heights, key=lambda key: heights[key]) == order or len(set(heights.values())) < len(heights)
    assert [text for _, text in figure.panels[0].x_ticks] == ["3", "6"]


def test_what_a_panel_shows_is_said_in_words(grid):
    _, comparison, look = grid
    figure = frontier.across_l0("explained_variance", comparison.tables, COLUMNS, look)
    assert figure is not None
    mean = comparison.tables[recipe("masked 0.5", "batchtopk", 3)]["explained_variance"].mean
    assert f"masked 0.5 {number(mean)}" in figure.panels[0].text


def test_a_control_that_would_squash_the_others_is_left_out_and_named(grid):
    _, comparison, look = grid
    figure = frontier.across_l0("explained_variance", comparison.tables, COLUMNS, look)
    assert figure is not None
    assert "Off the scale" in figure.note
    assert "untrained −1." in figure.note
    assert all(line.look.label != RANDOM for panel in figure.panels for line in panel.lines)
    absorption = frontier.across_l0("full_absorption_cross_token", comparison.tables, COLUMNS, look)
    assert absorption is not None
    assert "Off the scale" not in absorption.note
    assert any(line.look.label == MATCHED for line in absorption.panels[0].lines)


def test_a_control_at_another_l0_is_named_and_does_not_stretch_the_scale():
    measured = planted(NAMES, ks=(3, 6), n_seeds=2)
    far = [replace(r, values={**r.values, "l0": 256.0}) if r.recipe.kind == RANDOM else r for r in measured.results]
    comparison = compared(replace(measured, results=far))
    look = looks(comparison.tables)
    name = "full_absorption_cross_token"
    figure = frontier.across_l0(name, comparison.tables, COLUMNS, look)
    assert figure is not None
    assert figure.note.endswith("At another L0: untrained 256.0")
    labels = [line.look.label for line in figure.panels[0].lines]
    assert RANDOM not in labels
    assert MATCHED in labels
    single = compared(replace(measured, results=[r for r in far if r.recipe.k == 3]))
    figure = frontier.across_l0(name, single.tables, COLUMNS, looks(single.tables))
    assert figure is not None
    assert figure.charts[0].strips[-1].label == "untrained, L0\u00a0256"
    assert figures.probe_bars(1, single.tables, looks(single.tables))["batchtopk"][-2].label.endswith("L0\u00a0256")


def test_with_one_k_recipes_stand_side_by_side():
    comparison = compared(planted(NAMES, ("batchtopk", "matryoshka")))
    look = looks(comparison.tables)
    figure = frontier.across_l0("sae_top_1_test_auc", comparison.tables, COLUMNS, look)
    assert figure is not None
    assert figure.panels == ()
    assert [chart.title for chart in figure.charts] == ["batchtopk", "matryoshka"]
    strips = figure.charts[0].strips
    assert [strip.label for strip in strips[:4]] == [
        "unmasked",
        "masked 0.5",
        "gaussian (matched 0.5)",
        "unmasked, 220 latents",
    ]
    for strip in strips[:4]:
        assert strip.mean is not None
        assert strip.span is not None
        assert strip.span[0] <= strip.mean <= strip.span[1]
    assert all(strip.mean is None and strip.text.startswith("← ") for strip in strips[4:])


def test_what_was_not_measured_is_not_drawn(grid):
    _, comparison, look = grid
    assert frontier.across_l0("nothing", comparison.tables, COLUMNS, look) is None
    missing = {
        each: {**table, "delta_ce": Estimate(mean=math.nan, error=math.nan, n=1)}
        for each, table in comparison.tables.items()
    }
    assert frontier.across_l0("delta_ce", missing, COLUMNS, look) is None


def test_the_dense_probe_is_the_reference_of_probing(grid):
    tables, bench = grid[1].tables, "tiny, resid_post.2"
    assert figures.oracle_of("sae_top_16_test_auc", tables, bench) == (pytest.approx(0.97), "dense probe")
    assert figures.oracle_of("ood_gap_to_dense_16", tables, bench) == (0.0, "dense probe")
    assert figures.oracle_of("full_absorption_two_token", tables, bench) == (0.0, "oracle")
    assert figures.oracle_of("full_absorption_two_token", tables, "another") is None


def test_the_frontier_has_a_mark_for_each_mean_and_a_dot_for_each_seed_of_a_single_k():
    measured = planted(NAMES, ("batchtopk",))
    comparison = compared(measured)
    look = looks(comparison.tables)
    x, y = "explained_variance", "full_absorption_cross_token"
    figure = frontier.frontier(x, y, by_recipe(measured.results), comparison.tables, COLUMNS, look)
    assert figure is not None
    (panel,) = figure.panels
    assert [(len(line.points), len(line.dots), line.path) for line in panel.lines] == [(1, 3, "")] * 4
    for line in panel.lines:
        (point,) = line.points
        assert point.x == pytest.approx(np.mean([a for a, _ in line.dots]), abs=0.2)
        assert point.y == pytest.approx(np.mean([b for _, b in line.dots]), abs=0.2)
        assert point.left is not None
        assert point.right is not None
        assert point.left < point.x < point.right


def test_marks_of_the_forest_lie_where_the_interval_lies(grid):
    _, comparison, look = grid
    found = figures.forest(comparison.differences, COLUMNS, look)
    titles = [figure.title for figure in found]
    assert [figure.is_open for figure in found] == sorted((figure.is_open for figure in found), reverse=True)
    assert titles[0] == "absorption same"
    assert sum(len(chart.strips) for chart in found[0].charts) == len(comparison.differences) / len(found)
    for figure in found:
        for chart in figure.charts:
            assert chart.zero == 50.0
            for strip in chart.strips:
                assert strip.mean is not None
                assert strip.span is not None
                low, high = strip.span
                assert low <= strip.mean <= high
                assert strip.clear == (high < 50 or low > 50) or 49.9 < low < 50.1 or 49.9 < high < 50.1
                assert strip.text.startswith("+") == (strip.mean > 50) or strip.text.startswith("0.000")


def test_two_seeds_cannot_blow_up_the_scale():
    comparison = compared(planted(("unmasked", "masked 1.0"), n_seeds=2))
    look = looks(comparison.tables)
    figure = next(f for f in figures.forest(comparison.differences, COLUMNS, look) if f.title == "AUC1")
    (strip,) = figure.charts[0].strips
    assert strip.mean is not None
    assert abs(strip.mean - 50) > 10
    assert strip.span is not None
    assert 0.0 in strip.span or 100.0 in strip.span  # held inside the strip


def test_dots_of_a_recipe_are_its_seeds(grid):
    measured, _, look = grid
    figure = figures.seed_dots("full_absorption_cross_token", by_recipe(measured.results), COLUMNS, look)
    assert figure is not None
    assert {len(strip.dots) for chart in figure.charts for strip in chart.strips} == {3}
    assert figure.charts[0].strips[0].dots[0][1].startswith("seed 0: 0.")
    assert figures.seed_dots("nothing", by_recipe(measured.results), COLUMNS, look) is None


def test_probe_bars_end_with_the_dense_probe(grid):
    _, comparison, look = grid
    bars = figures.probe_bars(1, comparison.tables, look)
    assert list(bars) == ["batchtopk", "matryoshka"]
    assert bars["batchtopk"][-1].label.startswith("dense probe")
    auc = comparison.tables[recipe("unmasked", "batchtopk", 3)]["sae_top_1_test_auc"].mean
    assert bars["batchtopk"][0].usual == (Scale(low=0.5, high=1.0).place(auc), number(auc))
    assert figures.probe_bars(7, comparison.tables, look) == {}


def test_a_histogram_is_the_mean_over_seeds_and_fills_what_is_plain(grid):
    measured, _, look = grid
    groups = by_recipe(measured.results)
    plain = recipe("unmasked", "batchtopk", 3)
    means = histograms.mean_profiles(histograms.DENSITY, groups)
    assert means[plain].tolist() == np.mean([r.profiles["density_histogram"] for r in groups[plain]], axis=0).tolist()
    assert all(each.kind in LEARNED for each in means)
    figure = histograms.density(groups, look)
    assert figure is not None
    assert [panel.title for panel in figure.panels] == [
        "batchtopk k 3",
        "batchtopk k 6",
        "matryoshka k 3",
        "matryoshka k 6",
    ]
    assert [line.area for line in figure.panels[0].lines] == [True, False, False, False]
    assert histograms.density({}, look) is None


def test_steps_are_as_high_as_their_bins_and_span_the_scale():
    across, up = Scale(low=-1, high=1), Scale(low=0, high=4)
    path = histograms.steps(np.array([0.0, 4.0]), across, up, closed=False)
    numbers = [float(value) for value in re.findall(r"[\d.]+", path)]
    middle = (frontier.LEFT + frontier.RIGHT) / 2
    assert numbers[::2] == [frontier.LEFT, middle, middle, frontier.RIGHT]
    assert numbers[1::2] == [frontier.BOTTOM, frontier.BOTTOM, frontier.TOP, frontier.TOP]
    assert histograms.steps(np.array([1.0]), across, up, closed=True).endswith(f"L{frontier.RIGHT},{frontier.BOTTOM}Z")


def test_cooccurrence_shows_plain_and_masked_recipes_as_shares_of_pairs(grid):
    measured, _, look = grid
    figure = histograms.jaccard(by_recipe(measured.results), look)
    assert figure is not None
    assert [line.look.label for line in figure.panels[0].lines] == ["unmasked", "masked 0.5"]
    assert len(measured.results[0].profiles["jaccard_histogram"]) == len(HISTOGRAM_EDGES) - 1
    assert histograms.jaccard({}, look) is None
