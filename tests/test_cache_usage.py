"""A command line that is wrong for all ranks of a machine is said once, and one that is wrong for one rank by that."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cache_spec import usage
from cache_spec.command import run_command
from cache_spec.usage import is_of_many, words_of
from train.__main__ import app

ROOT = Path(__file__).parent.parent
TORCHRUN = ["/usr/bin/python", "/usr/bin/torchrun", "--nproc-per-node=2", "-m", "train"]
SECOND = {"LOCAL_RANK": "1", "RANK": "1"}


def torchrun(*words: str) -> str:
    """What two ranks of a command say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    return done.stderr


def test_a_mistyped_option_is_said_once_however_many_ranks_have_it():
    assert torchrun("harvest", "--no-such-option").count("No such option: --no-such-option") == 1


def test_an_option_that_only_one_rank_cannot_read_is_said_by_that_rank():
    """torchrun puts a rank's number where it is told to."""
    said = torchrun("train", "--cache", "nowhere", "--n${local_rank}", "1")
    assert "No such option: --n0" in said
    assert "No such option: --n1" in said


@pytest.mark.parametrize("arguments", [[], ["--k", "3"], ["--k", "", "--no-such"]])
def test_the_ranks_after_the_first_know_words_that_all_have(arguments):
    assert is_of_many(arguments, SECOND, [*TORCHRUN, *arguments])
    assert is_of_many(arguments, SECOND, [*TORCHRUN, "export", *arguments])


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, [*TORCHRUN, "--k", "3"]),  # no rank
        ({"LOCAL_RANK": "0"}, [*TORCHRUN, "--k", "3"]),  # the one that speaks
        (SECOND, [*TORCHRUN, "--k", "${local_rank}"]),
        (SECOND, [*TORCHRUN, "--k", "3", "4"]),
        (SECOND, ["bash", "each.sh", "--k", "3"]),  # which may give others other words
        (SECOND, ["3"]),
        (SECOND, []),  # the system does not tell
    ],
)
def test_whoever_may_be_alone_with_its_words_speaks(environ, launcher):
    assert not is_of_many(["--k", "3"], environ, launcher)


def test_the_words_of_a_process_are_those_it_was_started_with():
    command = [sys.executable, "-c", "input()", "--k", "", "µ"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert words_of(process.pid) in (command, [])  # not every system tells
        process.communicate(b"\n")
    assert words_of(2**31 - 1) == []


@pytest.fixture
def second(monkeypatch):
    """This process is the second rank, with a mistyped option."""
    words = ["--no-such-option"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    monkeypatch.setattr(usage, "words_of", lambda process: [*TORCHRUN, *words])
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_a_rank_whose_first_rank_says_nothing_speaks_after_a_while(second, monkeypatch, capsys):
    monkeypatch.setattr(usage, "PATIENCE_S", 0.01)
    with pytest.raises(SystemExit) as end:
        run_command(app)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("No such option") == 1


def test_a_rank_that_is_ended_after_the_first_one_spoke_says_nothing(second, monkeypatch, capsys):
    monkeypatch.setattr(usage.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        run_command(app)
    assert end.value.code == 2
    assert capsys.readouterr().err == ""
