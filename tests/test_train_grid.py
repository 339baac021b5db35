"""From the lists of the command line to the runs of a sweep: their product, their names, their schedule."""

from dataclasses import replace

import pytest
from train_fixtures import DATA, make_training_cache

from train.grid import Lists, Settings, make_runs
from train.loader import MixedBatchLoader
from train.reading import parse_numbers, parse_whole_numbers, read_device, split_list
from train.scale import Scale
from train.timetable import schedule_for

LISTS = Lists(arch=("topk",), d_sae=(32,), k=(3,), masked_fraction=(0.0,), corrupt=("none",), seed=(0,))
SCALE = Scale(norm_factor=2.0, displacement=0.25)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("grid") / "cache")


@pytest.fixture(scope="module")
def schedule(cache):
    return schedule_for(MixedBatchLoader(cache, DATA))


def test_a_grid_is_the_product_of_its_lists(schedule):
    lists = replace(LISTS, arch=("topk", "standard"), k=(2, 3), masked_fraction=(0.0, 0.5), seed=(0, 1))
    runs = make_runs(lists, schedule, SCALE, DATA)
    assert len(runs) == 8 + 4  # standard has no k
    assert len({run.name for run in runs}) == 12
    assert {run.k for run in runs if run.arch == "standard"} == {0}


def test_coefficients_of_one_penalty_are_a_list_and_other_penalties_go_with_each(schedule):
    lists = replace(LISTS, arch=("standard",), penalty=("l1=0.01", "l1=0.02", "auxk=0.1"), lr=(1e-3, 1e-4))
    runs = make_runs(lists, schedule, SCALE, DATA)
    assert len(runs) == 4
    assert {run.penalties for run in runs} == {("l1=0.01", "auxk=0.1"), ("l1=0.02", "auxk=0.1")}
    assert runs[0].name == "standard_d32_l10.01_auxk0.1_lr0.001_seed0"


def test_matching_solves_for_the_strength(schedule):
    lists = replace(LISTS, corrupt=("gaussian", "dropout"), match_strength=0.4)
    gaussian, dropout = make_runs(lists, schedule, SCALE, DATA)
    assert gaussian.corrupt == f"gaussian={0.1**0.5:.6g}"
    assert dropout.corrupt == f"dropout={0.1 / 1.1:.6g}"
    assert gaussian.name == "topk_d32_k3_gaussian_matched0.4_seed0"


def test_what_else_makes_a_recipe_is_in_the_name(schedule):
    lists = replace(LISTS, masked_fraction=(0.5,), consistency=(0.0, 0.1))
    data = replace(DATA, target_hook="layer_2")
    settings = Settings(masked_schedule="linear=100", skip=True)
    names = [run.name for run in make_runs(lists, schedule, SCALE, data, settings)]
    assert names == [
        "topk_to_layer_2_skip_d32_k3_masked0.5_linear100_seed0",
        "topk_to_layer_2_skip_d32_k3_masked0.5_linear100_consistency0.1_seed0",
    ]
    (run,) = make_runs(replace(LISTS, arch=("standard",)), schedule, SCALE, DATA, Settings(resample_every=500))
    assert (run.name, run.resample_every) == ("standard_d32_resample500_seed0", 500)


def test_another_variant_is_in_the_name(schedule):
    lists = replace(LISTS, masked_fraction=(0.5,), corrupt=("none", "gaussian"), match_strength=0.4)
    names = [run.name for run in make_runs(lists, schedule, SCALE, replace(DATA, masked_variant="random"))]
    assert names == ["topk_d32_k3_random0.5_seed0", "topk_d32_k3_random0.5_gaussian_matched_random0.4_seed0"]


def test_a_long_run_gets_the_published_schedule_and_a_short_one_a_share_of_it(cache):
    def of(n_steps: int):
        return schedule_for(MixedBatchLoader(cache, replace(DATA, n_tokens=32 * n_steps)))

    long = of(500_000)
    assert (long.warmup_steps, long.sparsity_warmup_steps, long.threshold_start) == (1000, 5000, 1000)
    assert (long.threshold_beta, long.decay_start) == (0.999, 400_000)
    assert long.anneal_start == 10_000
    assert of(4_000_000).dead_tokens == 10_000_000
    brief = of(1000)
    assert (brief.warmup_steps, brief.sparsity_warmup_steps, brief.threshold_start) == (50, 250, 50)
    assert (brief.threshold_beta, brief.decay_start, brief.dead_tokens) == (0.98, 800, 3200)
    assert of(20).threshold_start < 20


def test_numbers_and_lists_are_read_as_people_write_them():
    assert split_list(["20, 40", "40,80"]) == ("20", "40", "80")
    assert parse_whole_numbers(["1,2"], "--k") == (1, 2)
    assert parse_numbers(["0,.5"], "--lr") == (0.0, 0.5)
    assert read_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "near",
    [
        {"lr": (1e-3, 1.0000001e-3)},
        {"masked_fraction": (0.33333331, 0.33333334)},
        {"consistency": (0.1, 0.10000001)},
        {"corrupt": ("gaussian=0.3", "gaussian=0.30000001")},
    ],
)
def test_values_that_differ_in_the_eighth_digit_are_two_runs(schedule, near):
    runs = make_runs(replace(LISTS, **near), schedule, SCALE, DATA)
    assert len({run.name for run in runs}) == len(runs) == 2


def test_one_value_spelled_three_ways_is_one_run(schedule):
    lists = replace(LISTS, arch=("standard",), penalty=("l1=0.02", "l1 = 0.020", "l1=2e-2"))
    (run,) = make_runs(lists, schedule, SCALE, DATA)
    assert run.name == "standard_d32_l10.02_seed0"
    (noisy,) = make_runs(replace(LISTS, corrupt=("gaussian=0.3", "gaussian=.30")), schedule, SCALE, DATA)
    assert noisy.corrupt == "gaussian=0.3"
