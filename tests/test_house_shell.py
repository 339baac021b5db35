"""What docs/shell.md promises: exit codes, no colour codes on any terminal, examples that parse, keys of --json."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cache_fixtures import make_cache, make_plan
from terminal_fixtures import on_terminal
from train_fixtures import make_training_cache

from benchmarks.size import python_files
from cache_spec import ActivationCache
from cache_spec.command import INTERRUPTED, app_for, examples
from completions.commands import ROOMS, commands

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/shell.md").read_text()


def table(first: str) -> dict[str, str]:
    """The table whose first column has this heading: its first cells, and what stands beside them."""
    match = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert match, f"no table of {first}"
    rows = [line.strip("|").split("|", 1) for line in match[1].splitlines()]
    return {name.strip(): rest for cells, rest in rows for name in cells.replace("`", "").split(",")}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("shell") / "whole", make_plan())


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("shell") / "half", make_plan(), shards=range(1), finalize=False)


def test_the_exit_codes_are_those_of_the_code():
    """Of every UserError (no other class has an exit_code), of Ctrl-C, and of what went well."""
    paths = python_files(*ROOMS, "completions")
    texts = [path.read_text() for path in paths]
    codes = {int(code) for text in texts for code in re.findall(r"^    exit_code = (\d+)$", text, re.MULTILINE)}
    assert {int(code) for code in table("code")} == codes | {0, INTERRUPTED}
    by_hand = [path.name for path in paths if re.search(r"sys\.exit\(|typer\.Exit\(|os\._exit\(", path.read_text())]
    assert sorted(by_hand) == ["command.py", "watch.py"], "ends of an import of torch, and of a rank that hangs"


def test_each_code_up_to_2_is_seen(whole, unfinished, tmp_path):
    for code, path in ((0, whole), (1, unfinished), (2, tmp_path)):
        done = run("cache_spec", "verify", path)
        assert done.returncode == code
        assert done.stderr.splitlines()[-1].startswith("error: ") == (code > 0)
    mistyped = run("cache_spec", "verify", whole, "--fast")
    assert mistyped.returncode == 2
    assert mistyped.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("setting", [{}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}])
def test_nothing_on_a_terminal_has_colour_codes(setting, whole, unfinished, tmp_path):
    """A bar of progress, a usage error, one of our errors."""
    for words, said in (
        (["cache_spec", "verify", whole], b"100%"),
        (["cache_spec", "verify", unfinished], b"error: "),
        (["train", "--cache", whole, "--out", tmp_path / "runs", "--arhc", "topk"], b"No such option"),
    ):
        process = on_terminal(sys.executable, "-m", *words, **setting)
        shown, _ = process.communicate(timeout=60)
        assert said in shown
        assert b"\x1b" not in shown


@pytest.mark.parametrize("name", commands())
def test_no_command_draws_its_help_and_errors_with_rich(name):
    assert commands()[name].rich_markup_mode is None


def shown_examples(name: str) -> list[list[str]]:
    """The words of each command under Examples in a --help, as it is printed."""
    command = commands()[name]
    text = command.get_help(command.make_context(f"python -m {name}", ["--help"], resilient_parsing=True))
    lines = text.partition("Examples:\n")[2].partition("\n\n")[0].replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition("|")[0].partition(">")[0]) for line in lines]


@pytest.mark.parametrize("name", commands())
def test_every_help_has_examples_and_all_of_them_parse(name):
    found = shown_examples(name)
    assert found
    for words in found:
        assert words[: len(name.split()) + 2] == ["python", "-m", *name.split()]
        commands()[name].make_context(name, words[len(name.split()) + 2 :])


def test_the_lines_of_examples_stay_as_they_are_and_the_commands_beside_are_named():
    assert examples("do a \\\n  --b", "do c") == "\b\nExamples:\n  do a \\\n    --b\n  do c"
    assert examples("do a", others={"undo": "x", "redo": "y"}).endswith("each with its own --help: undo, redo.")


def test_a_first_word_chooses_a_command_beside_the_main_one():
    arguments = ["place/train/__main__.py", "there", "--help"]
    assert app_for(arguments, main := lambda: None, {"else": "nowhere"}) is main
    assert app_for(arguments, main, {"there": "completions.__main__"}) is not main
    assert arguments[1:] == ["--help"]


@pytest.mark.parametrize("name", [name for name in commands() if " " in name])
def test_a_usage_line_names_the_whole_command(name):
    done = run(*name.split(), "--no-such-option")
    assert done.returncode == 2
    assert done.stderr.startswith(f"Usage: python -m {name} ")
    assert f"Try 'python -m {name} --help'" in done.stderr


def test_info_as_json_has_the_documented_keys_and_the_caches_facts(whole):
    done = run("cache_spec", "info", whole, "--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    facts = json.loads(done.stdout)
    assert list(facts) == list(table("info key"))
    cache = ActivationCache.open(whole)
    assert facts["cache_id"] == cache.plan.cache_id
    assert facts["rows"] == {"train": 128, "held_out": 22, "order": "shuffled_within_shard"}
    assert facts["shards"] == {"committed": 3, "planned": 3, "rows": 64}
    assert facts["bytes"]["stored"] == facts["bytes"]["planned"]
    largest = max(abs(cache.activations("layer_1", v, s)).max() for v in ("clean", "masked") for s in cache.shards)
    assert facts["hooks"][0]["largest"] == float(largest)
    assert facts["variants"][1]["mask_prob"] == 0.3


def test_info_as_json_of_an_unfinished_cache_says_how_much_is_there(unfinished):
    facts = json.loads(run("cache_spec", "info", unfinished, "--json").stdout)
    assert facts["status"] == "harvesting"
    assert facts["shards"]["committed"] == 1
    assert 0 < facts["bytes"]["stored"] < facts["bytes"]["planned"]


def test_verify_as_json_has_the_verdict_whatever_it_is(whole, unfinished, tmp_path):
    done = run("cache_spec", "verify", whole, "--json")
    facts = json.loads(done.stdout)
    assert list(facts) == list(table("verify key"))
    assert (done.returncode, facts["whole"], facts["problems"]) == (0, True, [])
    done = run("cache_spec", "verify", unfinished, "--json")
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["whole"]) == (1, False)
    assert facts["problems"][0]["kind"] == "unfinished"
    assert set(facts["problems"][0]) == {"file", "what", "kind"}
    done = run("cache_spec", "verify", tmp_path, "--json")
    assert (done.returncode, done.stdout) == (2, "")


def test_what_a_harvest_will_take_as_json(tmp_path):
    words = ("harvest", "--model", "tiny", "--tokens", "50k", "--out", tmp_path / "cache", "--shard", "1/2")
    done = run(*words, "--dry-run", "--json")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    facts = json.loads(done.stdout)
    assert list(facts) == list(table("harvest key"))
    assert facts["share"] == "1/2"
    assert facts["rows"]["train"] + facts["rows"]["held_out"] <= 50_000
    assert facts["shards"]["own"] == facts["shards"]["missing"] // 2
    assert facts["seconds"] > 0
    assert not (tmp_path / "cache").exists()
    assert run(*words, "--json").returncode == 2


def test_what_a_sweep_will_take_as_json(tmp_path):
    cache = make_training_cache(tmp_path / "cache").path
    words = (
        "train",
        "--cache",
        cache,
        "--out",
        tmp_path / "runs",
        "--d-sae",
        32,
        "--k",
        "3,4",
        "--tokens",
        640,
        "--batch-size",
        32,
    )
    done = run(*words, "--dry-run", "--json")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    facts = json.loads(done.stdout)
    assert list(facts) == list(table("train key"))
    assert [each["name"] for each in facts["runs"]] == ["batchtopk_d32_k3_seed0", "batchtopk_d32_k4_seed0"]
    assert facts["steps"] == facts["tokens"] // 32 == 20
    assert facts["memory"]["passes"] == 1
    one, other = names = [each["name"] for each in facts["runs"]]
    assert (facts["parallel"], facts["ranks"]) == ("", [names])
    assert run(*words, "--json").returncode == 2
    for parallel, ranks in (("sweep", [[one], [other]]), ("data", [names, names])):
        how = ("--dry-run", "--json", "--parallel", parallel)
        done = run("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *words, *how)
        assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
        facts = json.loads(done.stdout)
        assert (facts["parallel"], facts["ranks"]) == (parallel, ranks)
    assert not (tmp_path / "runs").exists()


def test_the_commands_of_the_page_run(tmp_path):
    """Word for word, on a smaller cache, by a user whose checkout is the current folder."""
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL):
        command = ["bash", "-e", "-c", block.replace("200k", "20k")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / ".granary-completions").stat().st_size > 1000
