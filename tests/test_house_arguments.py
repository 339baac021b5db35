"""Every command with every option given anything: it does what was asked, or ends with one sentence and 1 or 2."""

import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from cache_fixtures import scratch
from fuzz_fixtures import bounded
from fuzz_targets import target
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cache_spec.command import run_command
from completions.commands import commands

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
COMMANDS = commands()
BASE = {  # what each needs; {} is a folder with a cache and runs, . an empty one
    "cache_spec info": ["{}/cache"],
    "cache_spec verify": ["{}/cache"],
    "cache_spec transcode": ["{}/cache", "out"],
    "cache_spec push": ["{}/cache", "--repo", "a/b", "--dry-run"],
    "cache_spec pull": ["a/b", "out"],
    "harvest": ["--model", "tiny", "--tokens", "2k", "--out", "out", "--dry-run"],
    "train": ["--cache", "{}/training_cache", "--out", "out", "--d-sae", "32", "--k", "3", "--dry-run"],
    "train export": ["{}/runs/topk", "--to", "saelens", "--out", "out"],
    "train import": ["{}/saelens"],
    "train push": ["{}/runs", "--repo", "a/b", "--dry-run"],
    "evaluate": ["{}/stopped", "--metrics", "core"],
    "evaluate features": ["{}/stopped", "--out", "out"],
    "evaluate neuronpedia": ["{}/stopped", "--out", "out"],
    "evaluate saebench": ["{}/stopped", "--out", "out"],
}
WORDS = (
    *("", " ", "-", "--", "-1", "0", "1", "3", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "٣", "1,2", ",", "1,,2"),
    *(
        "9" * 30,
        "9" * 5000,
        "0x10",
        "1_0",
        "1k",
        "1T",
        "9" * 30 + "M",
        "-5k",
        "1/0",
        "0/1",
        "3/2",
        "a/b",
        "1/9",
    ),
    *("/etc/passwd", "/dev/null", "/dev/zero", "..", ".", "/", "~", "x" * 300, "x" * 5000, "a\nb", "\x1b[2J", "\udc80"),
    *("../../../etc/passwd", "layer_1", "batchtopk", "topk,topk", "gaussian=nan", "l1=inf", "l1=", "=", "l0=1e309"),
    *("cpu", "cuda:99", "mps:", "tiny", "masked", "clean", "linear=-1", "linear=9999999999999", "%s", "$(id)", "💥"),
)


WHOLE = ("-1", "0", "1", "2", "3", "7", "64", "1000", str(2**31), str(2**63), "9" * 30, "-" + "9" * 30)
REAL = ("-1", "0", "-0.0", "1", "0.3", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "1e300", "9" * 400)


def arguments(name: str) -> st.SearchStrategy[list[str]]:
    """One to three options of a command with values near those that they take, and now and then a word alone."""
    word = st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=8)
    whole, real = st.sampled_from(WHOLE), st.sampled_from(REAL)
    kinds = {int: whole, float: whole | real}  # by the default; what has none takes words
    with_value = [
        st.just([name]) if is_flag else kinds.get(kind, word | whole | real).map(lambda value, name=name: [name, value])
        for name, is_flag, kind in (
            (parameter.opts[-1], getattr(parameter, "is_flag", False), type(parameter.default))
            for parameter in COMMANDS[name].params
        )
        if name.startswith("-")
    ]
    option = st.one_of(with_value) if with_value else st.just(["--help"])
    options = st.lists(option, min_size=1, max_size=3).map(lambda parts: list(chain.from_iterable(parts)))
    return options | options | st.tuples(options, word).map(lambda both: [*both[0], both[1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("arguments")
    target("plan", made)
    target("run.json", made)
    return made


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def outcome(name: str, words: list[str], capsys) -> tuple[int, str]:
    """Exit code and what was said of a command line; what is no exit comes through and fails the test."""
    if isinstance(sys.stderr, io.TextIOWrapper):  # as the system has it, and capsys has not
        sys.stderr.reconfigure(errors="backslashreplace")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_command(lambda: COMMANDS[name].main(args=words, prog_name=name))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.getLogger().setLevel(logging.WARNING)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(BASE))
@pytest.mark.filterwarnings("default")
def test_any_option_is_done_or_refused_in_a_sentence(name, folder, capsys, monkeypatch):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(arguments(name))
    def check(words: list[str]):
        with scratch() as empty, bounded(seconds=60):
            monkeypatch.chdir(empty)
            code, said = outcome(name, [word.replace("{}", str(folder), 1) for word in BASE[name]] + words, capsys)
            monkeypatch.chdir(Path(__file__).parent)
            assert code in (0, 1, 2), said
            assert code == 0 or re.search(r"error: .{10}|Error: .{5}|Usage: ", said, re.DOTALL), said
            assert "Traceback" not in said
            assert not {"\x1b", "\udc80"} & set(said)

    check()


def test_every_command_is_tried():
    assert set(BASE) == set(COMMANDS)


def test_a_name_that_no_terminal_can_show_is_spelled_out(folder, tmp_path):
    """As a process, since what the standard output takes is decided there."""
    strange = tmp_path / os.fsdecode(b"\xff\x1b[2J")
    shutil.copytree(folder / "cache", strange)
    for command in ("info", "verify"):
        done = subprocess.run(
            [sys.executable, "-m", "cache_spec", command, strange],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout
        assert b"\\x1b[2J" in done.stdout
