"""`python -m train`: the grid, the schedule, and one sentence for each mistake."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_fixtures import DATA, make_training_cache
from typer.testing import CliRunner

from cache_spec import UserError
from train.__main__ import app
from train.checkpoint import checkpoint_step
from train.config import DataConfig, RunConfig
from train.grid import Lists, make_runs
from train.loader import MixedBatchLoader
from train.options import Options
from train.passes import needed_bytes
from train.reading import with_preset
from train.scale import Scale
from train.timetable import schedule_for

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
        assert result.exception.exit_code == 2, result.exception
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
    table = [
        line for line in first[first.index("\nrun ") :].splitlines() if line.startswith(("batchtopk", "matryoshka"))
    ]
    assert len(table) == 8
    again = run(*grid, "--masked-fraction", "0,0.5")
    assert all(line in again.splitlines() for line in table)
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
        (["--arch", "transformer"], "no architecture 'transformer'; there are batchtopk, "),
        (["--k", "33"], "--k 33 is not between 1 and --d-sae 32"),
        (["--k", "0"], "--k 0 is not"),
        (["--k", "three"], "--k has 'three'; give whole numbers"),
        (["--d-sae", "0"], "--d-sae 0 is not positive"),
        (["--arch", "matryoshka", "--d-sae", "16"], "at least 32"),
        (["--hook", "layer_7"], "holds layer_1, not layer_7"),
        (["--hook", "somewhere"], "'somewhere' is not a hook point"),
        (["--penalty", "l7=1"], "no penalty 'l7'; there are auxk, "),
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
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--corrupt", "gaussian=1e39"], "gaussian=1e+39 is not 0 to 1000"),
        (["--corrupt", "gaussian=inf"], "is not a corruption"),
        (["--match-strength", "0.5"], "add one, such as --corrupt gaussian"),
        (["--lr", "inf"], "--lr inf is not positive and finite"),
        (["--tokens", "31"], "less than one batch"),
        (["--tokens", "608"], "608 tokens make 19 steps of 32 rows, and a run needs at least 20"),
        (["--tokens", "many"], "--tokens is 'many'"),
        (["--batch-size", "4096", "--tokens", "1M"], "lower --batch-size"),
        (["--lr", "0"], "--lr 0.0 is not positive"),
        (["--profile", "--dry-run"], "--profile looks at steps of training and --dry-run makes none; leave one"),
        (["--kernel", "warp"], "no kernel 'warp'; there are dense"),
        (["--precision", "fp8"], "--precision fp8 is unknown; it is one of fp32, bf16"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--positions", "odd"], "--positions odd is unknown"),
        (["--target", "clean", "--masked-fraction", "0.5"], "add --positions drop_masked, or --force"),
        (["--warmup-steps", "20"], "--warmup-steps 20 is not between 0 and the 20 steps"),
        (["--threshold-beta", "1"], "--threshold-beta 1.0"),
        (["--dead-tokens", "0"], "--dead-tokens 0 is not positive"),
        (["--anneal-start", "20"], "--anneal-start 20 is not between 0 and the 20 steps"),
        (["--target-hook", "layer_7"], "holds layer_1, not layer_7"),
        (["--skip"], "--skip gives a transcoder a linear path; add --target-hook"),
        (["--masked-schedule", "cosine"], "--masked-schedule cosine is unknown"),
        (["--masked-schedule", "linear=0"], "--masked-schedule linear=0 is unknown"),
        (["--consistency", "-1"], "--consistency -1.0 is not a finite weight"),
        (["--consistency", "much"], "--consistency has 'much'"),
        (["--decoder", "loose"], "--decoder loose is unknown; it is one of unit, free"),
        (["--init-b-dec", "random"], "--init-b-dec random is unknown; it is one of zero, median, mean"),
        (["--clip-norm", "-1"], "--clip-norm -1.0 is not"),
        (["--beta1", "1"], "--beta1 1.0 is not between 0 and 1"),
        (["--bandwidth", "0"], "--bandwidth 0.0 is not positive"),
        (["--memory", "some"], "--memory is 'some'; give a size such as 16G"),
        (["--memory", "1K"], "alone needs"),
        (["--track", "mlflow"], "--track mlflow is unknown; it is one of wandb, trackio, tensorboard"),
        (["--preset", "none"], "no preset 'none'; there are paper"),
        (["--io", "carrier-pigeon"], "--io carrier-pigeon is unknown"),
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
    words["no masks to be consistent with"] = run(*short(plain, tmp_path / "runs", "--consistency", "0.1"))
    bad = make_training_cache(tmp_path / "bad")
    shard = next((bad.path / "layer_1" / "clean" / "c").iterdir()) / "0"
    shard.write_bytes(b"\x00\x3c" + shard.read_bytes()[2:])
    words["bad shard"] = run(*short(bad, tmp_path / "runs"))
    late = make_training_cache(tmp_path / "late")
    shard = late.path / "layer_1" / "clean" / "c" / str(late.held_out_shards[0]) / "0"
    shard.write_bytes(b"\x00\x3c" + shard.read_bytes()[2:])
    words["bad held-out shard"] = run(*short(late, tmp_path / "runs"))
    newer = make_training_cache(tmp_path / "newer")
    group = newer.path / "zarr.json"
    group.write_text(group.read_text().replace('"spec_version": "1', '"spec_version": "2'))
    words["another version"] = run(*short(newer, tmp_path / "runs"))
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
        "no masks to be consistent with": "not masked",
        "bad shard": "checksum",
        "bad held-out shard": "checksum",
        "another version": "version",
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
    for option in ("--masked-fraction", "--match-strength", "--resume", "--positions", "--calibrate", "--track"):
        assert option in printed
    texts = {parameter.name: getattr(parameter, "help", "") for parameter in _parameters()}
    assert not [name for name, text in texts.items() if not text]
    groups = [text[1 : text.index(")")] for text in texts.values() if text.startswith("(")]
    assert list(dict.fromkeys(groups)) == ["data", "grid", "training", "machine", "run"]  # each in one piece
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index)


def test_every_fact_of_a_run_has_an_option():
    """Whatever decides a run can be asked for; what follows from other options is named here."""
    derived = {"name", "matched_fraction", "penalties", "n_tokens", "seed"}
    options = {parameter.name for parameter in _parameters()} | derived
    for config in (RunConfig, DataConfig):
        assert {field.name for field in dataclasses.fields(config)} <= options


def _parameters():
    from typer.main import get_command

    return [parameter for parameter in get_command(app).params if parameter.name != "help"]


def test_help_and_the_package_come_without_torch():
    code = "import sys, train, train.options, train.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    import train

    assert [getattr(train, name) for name in train.__all__]
    with pytest.raises(AttributeError, match="no name 'nothing'"):
        _ = train.nothing


def test_ctrl_c_in_the_first_second_leaves_no_traceback(cache, tmp_path):
    """While Python still imports typer, numpy or torch."""
    command = [sys.executable, "-X", "importtime", "-m", "train", *map(str, short(cache, tmp_path / "runs"))]
    for module in (b"typer", b"numpy", b"torch"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stderr is not None
        assert any(module in line for line in process.stderr)  # one line for each import that is done
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGINT, 130), errors
        assert b"Traceback" not in errors
        assert not (tmp_path / "runs").exists()


def test_the_preset_sets_what_was_published_and_what_is_given_wins(cache, tmp_path):
    arguments = ["--cache", cache.path, "--out", tmp_path / "runs", "--d-sae", 32, "--k", 3, "--dry-run"]
    printed = run(*arguments, "--preset", "paper", "--batch-size", 64, "--tokens", "500M")
    assert "preset    paper: --lr 3e-4 --seed 0 --warmup-steps 1000" in printed
    assert "warm-up 1000, sparsity warm-up 5000, decay from 6,250,000, threshold from 1000 with beta 0.999" in printed
    assert "dead after 10,000,000 tokens" in printed
    options, chosen = with_preset(Options(cache=cache.path, out=tmp_path, preset="paper"), {"preset"})
    assert (options.tokens, options.batch_size, options.lr, options.seed) == ("500M", 2048, ["3e-4"], ["0"])
    assert chosen["threshold_beta"] == 0.999
    assert 500_000_000 // 2048 == 244_140
    assert with_preset(Options(cache=cache.path, out=tmp_path), set())[1] == {}


def test_the_plan_says_how_many_passes_before_anything_starts(cache, tmp_path):
    grid = short(cache, tmp_path / "runs", "--seed", "0,1,2,3", "--dry-run")
    assert "4 SAEs need about" in run(*grid)
    loader = MixedBatchLoader(cache, replace(DATA, n_tokens=640))
    runs = make_runs(replace(LISTS, seed=(0, 1, 2, 3)), schedule_for(loader), SCALE, DATA)
    memory = needed_bytes(runs[:2], loader, torch.get_num_threads())  # as many steps at once as the command runs
    assert "2 passes of 2, each reads the cache" in run(*grid, "--arch", "topk", "--memory", memory)


def test_more_tokens_than_rows_are_announced_as_epochs(cache, tmp_path):
    assert "epochs" in run(*short(cache, tmp_path / "runs", "--dry-run"))
    assert "rows will be seen up to" in run(*short(cache, tmp_path / "runs", "--dry-run"))


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


def test_sigterm_keeps_every_step_of_a_background_job_too(cache, tmp_path):
    """A shell starts the background jobs of a script with Ctrl-C ignored; a scheduler's SIGTERM is not ignored."""
    folder = tmp_path / "runs/batchtopk_d32_k3_seed0"
    command = [sys.executable, "-m", "train", *map(str, short(cache, tmp_path / "runs")), "--tokens", "50M"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # ignored
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    step = checkpoint_step(folder)
    assert step > 0
    assert f"add --resume to go on from step {step:,}" in errors
