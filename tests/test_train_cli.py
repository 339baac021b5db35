"""`python -m train`: the grid, the schedule, and one sentence for each mistake."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from train_fixtures import DATA, make_training_cache
from typer.testing import CliRunner

from cache_spec import UserError
from train.__main__ import app
from train.grid import Lists, make_runs, schedule_for
from train.loader import MixedBatchLoader
from train.reading import parse_numbers, parse_whole_numbers, read_device, split_list
from train.scale import Scale

ROOT = Path(__file__).parent.parent
LISTS = Lists(arch=("topk",), d_sae=(32,), k=(3,), masked_fraction=(0.0,), corrupt=("none",), seed=(0,))
SCALE = Scale(norm_factor=2.0, displacement=0.25)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("cli") / "cache")


@pytest.fixture(scope="module")
def schedule(cache):
    return schedule_for(MixedBatchLoader(cache, DATA))


def run(*arguments: object) -> str:
    """Run the command in this process; its output, or the sentence of its UserError."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        return f"error: {result.exception}"
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def short(cache, out: Path, *more: object) -> list[object]:
    return ["--cache", cache.path, "--out", out, "--k", 3, "--d-sae", 32, "--batch-size", 32, "--tokens", 640, *more]


def test_the_demo_s_commands_make_their_runs(cache, tmp_path):
    out = tmp_path / "runs"
    grid = short(cache, out, "--arch", "batchtopk", "--arch", "matryoshka", "--seed", "0,1", "--resume")
    first = run(*grid, "--masked-fraction", "0,0.5")
    run(*grid, "--corrupt", "gaussian", "--match-strength", "0.5")
    recipes = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/run.json")}
    assert len(recipes) == 12
    assert {facts["status"] for facts in recipes.values()} == {"complete"}
    noisy = recipes["batchtopk_d32_k3_gaussian_matched0.5_seed1"]
    assert recipes["matryoshka_d32_k3_masked0.5_seed0"]["recipe"] == "masked 0.5"
    strength = float(noisy["config"]["corrupt"].removeprefix("gaussian="))
    assert strength == pytest.approx((0.5 * noisy["displacement"]) ** 0.5, rel=1e-5)
    assert noisy["recipe"] == f"gaussian {strength:.3g} (matched 0.5)"
    assert "640 tokens: 20 steps of 32" in first
    assert "epochs" in first
    assert "memory" in first
    table = first[first.index("explained") :].splitlines()
    assert len(table) == 9
    again = run(*grid, "--masked-fraction", "0,0.5")
    assert again[again.index("explained") :].splitlines() == table
    before = noisy["config"]["corrupt"]
    assert json.loads((out / noisy["name"] / "run.json").read_text())["config"]["corrupt"] == before


def test_dry_run_prints_the_runs_and_writes_nothing(cache, tmp_path):
    printed = run(*short(cache, tmp_path / "runs", "--arch", "topk,standard", "--dry-run"))
    assert "topk_d32_k3_seed0" in printed
    assert "standard_d32_seed0" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "transformer"], "no architecture 'transformer'; there are batchtopk, jumprelu, matryoshka"),
        (["--k", "33"], "--k 33 is not between 1 and --d-sae 32"),
        (["--k", "0"], "--k 0 is not"),
        (["--k", "three"], "--k has 'three'; give whole numbers"),
        (["--d-sae", "0"], "--d-sae 0 is not positive"),
        (["--arch", "matryoshka", "--d-sae", "16"], "at least 32"),
        (["--hook", "layer_7"], "holds layer_1, not layer_7"),
        (["--hook", "somewhere"], "'somewhere' is not a hook point"),
        (["--penalty", "l7=1"], "no penalty 'l7'; there are auxk, l0, l1"),
        (["--penalty", "l1"], "'l1' is not a penalty; write a name and a number, such as l1=0.1"),
        (["--corrupt", "salt=1"], "no corruption 'salt'; there are dropout, gaussian"),
        (["--corrupt", "gaussian"], "is not a corruption"),
        (["--corrupt", "dropout=1"], "dropout=1.0 is not a probability"),
        (["--corrupt", "gaussian=0.2", "--match-strength", "0.5"], "give one of them"),
        (["--corrupt", "salt", "--match-strength", "0.5"], "no corruption 'salt'"),
        (["--corrupt", "gaussian", "--match-strength", "2"], "--match-strength 2.0 is not"),
        (["--masked-fraction", "1.5"], "--masked-fraction 1.5 is not between 0 and 1"),
        (["--masked-fraction", ""], "--masked-fraction is empty"),
        (["--masked-fraction", "nan"], "not between 0 and 1"),
        (["--masked-variant", "other", "--masked-fraction", "0.5"], "holds the variants clean, masked, not other"),
        (["--masked-variant", "other"], "holds the variants clean, masked, not other"),
        (["--masked-variant", "clean", "--positions", "only_masked"], "--masked-variant clean is the unmasked one"),
        (["--penalty", "l0=1", "--arch", "batchtopk"], "l0 needs the thresholds of jumprelu"),
        (["--penalty", "l1=nan"], "'l1=nan' is not a penalty"),
        (["--penalty", "l1=-1"], "--penalty l1=-1 is negative"),
        (["--corrupt", "gaussian=inf"], "is not a corruption"),
        (["--match-strength", "0.5"], "add one, such as --corrupt gaussian"),
        (["--lr", "inf"], "--lr inf is not positive and finite"),
        (["--tokens", "31"], "less than one batch"),
        (["--tokens", "608"], "608 tokens make 19 steps of 32 rows, and a run needs at least 20"),
        (["--tokens", "many"], "--tokens is 'many'"),
        (["--batch-size", "4096", "--tokens", "1M"], "lower --batch-size"),
        (["--lr", "0"], "--lr 0.0 is not positive"),
        (["--kernel", "triton"], "no kernel 'triton'; there are dense"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--positions", "odd"], "--positions odd is unknown"),
        (["--target", "clean", "--masked-fraction", "0.5"], "add --positions drop_masked, or --force"),
        (["--warmup-steps", "20"], "--warmup-steps 20 is not between 0 and the 20 steps"),
        (["--threshold-beta", "1"], "--threshold-beta 1.0"),
        (["--dead-tokens", "0"], "--dead-tokens 0 is not positive"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(cache, tmp_path, arguments, words):
    printed = run(*short(cache, tmp_path / "runs", *arguments))
    assert printed.startswith("error: ")
    assert words in printed
    assert "\n" not in printed.strip()
    assert not (tmp_path / "runs").exists()


def test_a_cache_that_cannot_be_used_gets_one_sentence(cache, tmp_path):
    words = {}
    words["missing"] = run(*short(replace(cache, path=tmp_path / "nowhere"), tmp_path / "runs"))
    plain = make_training_cache(tmp_path / "plain", masked=False)
    words["no masks"] = run(*short(plain, tmp_path / "runs", "--masked-fraction", "0.5"))
    words["nothing to match"] = run(
        *short(plain, tmp_path / "runs", "--corrupt", "gaussian", "--match-strength", "0.5")
    )
    two = make_training_cache(tmp_path / "two", layers=(1, 2))
    words["which hook"] = run(*short(two, tmp_path / "runs"))
    half = make_training_cache(tmp_path / "half")
    next((half.path / "_granary" / "shards").glob("*1.json")).unlink()
    words["half"] = run(*short(half, tmp_path / "runs"))
    damaged = make_training_cache(tmp_path / "damaged")
    column = next((damaged.path / "rows" / "flags" / "c").iterdir())
    column.write_bytes(b"\xff" + column.read_bytes()[1:])
    words["damaged"] = run(*short(damaged, tmp_path / "runs"))
    for case, expected in {
        "missing": "nothing at",
        "no masks": "not masked",
        "nothing to match": "not masked",
        "which hook": "layer_1, layer_2; choose one with --hook",
        "half": "shard",
        "damaged": "checksum",
    }.items():
        assert words[case].startswith("error: "), case
        assert expected in words[case], (case, words[case])
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_shell_is_one_line_and_exit_code_2(cache, tmp_path):
    arguments = [str(argument) for argument in short(cache, tmp_path / "runs", "--k", "33")]
    done = subprocess.run(
        [sys.executable, "-m", "train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stderr == "error: --k 33 is not between 1 and --d-sae 32\n"


def test_help_explains_every_option():
    printed = run("--help")
    for option in ("--masked-fraction", "--match-strength", "--resume", "--positions"):
        assert option in printed
    assert not [parameter.name for parameter in _parameters() if not getattr(parameter, "help", "")]


def _parameters():
    from typer.main import get_command

    return [parameter for parameter in get_command(app).params if parameter.name != "help"]


def test_clean_targets_are_allowed_where_they_make_sense(cache, tmp_path):
    for i, more in enumerate(
        (
            ["--positions", "drop_masked", "--masked-fraction", "0.5"],
            ["--force", "--masked-fraction", "0.5"],
            ["--corrupt", "gaussian=0.3"],
        )
    ):
        run(*short(cache, tmp_path / str(i), "--target", "clean", *more))
        assert list((tmp_path / str(i)).glob("*/cfg.json"))


def test_a_grid_is_the_product_of_its_lists(schedule):
    lists = replace(LISTS, arch=("topk", "standard"), k=(2, 3), masked_fraction=(0.0, 0.5), seed=(0, 1))
    runs = make_runs(lists, schedule, SCALE)
    assert len(runs) == 8 + 4  # standard has no k
    assert len({run.name for run in runs}) == 12
    assert {run.k for run in runs if run.arch == "standard"} == {0}


def test_coefficients_of_one_penalty_are_a_list_and_other_penalties_go_with_each(schedule):
    lists = replace(LISTS, arch=("standard",), penalty=("l1=0.01", "l1=0.02", "auxk=0.1"), lr=(1e-3, 1e-4))
    runs = make_runs(lists, schedule, SCALE)
    assert len(runs) == 4
    assert {run.penalties for run in runs} == {("l1=0.01", "auxk=0.1"), ("l1=0.02", "auxk=0.1")}
    assert runs[0].name == "standard_d32_l10.01_auxk0.1_lr0.001_seed0"


def test_matching_solves_for_the_strength(schedule):
    lists = replace(LISTS, corrupt=("gaussian", "dropout"), match_strength=0.4)
    gaussian, dropout = make_runs(lists, schedule, SCALE)
    assert gaussian.corrupt == f"gaussian={0.1**0.5:.6g}"
    assert dropout.corrupt == f"dropout={0.1 / 1.1:.6g}"
    assert gaussian.name == "topk_d32_k3_gaussian_matched0.4_seed0"


def test_another_variant_is_in_the_name(schedule):
    lists = replace(LISTS, masked_fraction=(0.5,), corrupt=("none", "gaussian"), match_strength=0.4)
    names = [run.name for run in make_runs(lists, schedule, SCALE, "random")]
    assert names == ["topk_d32_k3_random0.5_seed0", "topk_d32_k3_random0.5_gaussian_matched_random0.4_seed0"]


def test_a_long_run_gets_the_published_schedule_and_a_short_one_a_share_of_it(cache):
    def of(n_steps: int):
        return schedule_for(MixedBatchLoader(cache, replace(DATA, n_tokens=32 * n_steps)))

    long = of(500_000)
    assert (long.warmup_steps, long.sparsity_warmup_steps, long.threshold_start) == (1000, 5000, 1000)
    assert (long.threshold_beta, long.decay_start) == (0.999, 400_000)
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
