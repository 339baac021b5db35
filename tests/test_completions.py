"""Completion as a user meets it: keys typed into a real shell, and every option and name of the apps in the script."""

import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from terminal_fixtures import on_terminal

from completions.commands import ROOMS, VALUES, commands, options
from completions.script import script

SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completions") / "script"
    path.write_text(script())
    return path


def typed(shell: str, file: Path, keys: list[tuple[str, str]]) -> str:
    """What a shell shows after each of `keys`; each is typed when what was to come of the one before is there."""
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    with on_terminal(*SHELLS[shell], TERM="dumb", PS1="$ ", HISTFILE="") as process:
        assert process.stdin
        assert process.stdout
        shown = ""
        for text, wanted in [(f"source {file}; echo rea''dy\n", "ready"), *keys]:
            process.stdin.write(text.encode())
            before, end = len(shown), time.monotonic() + 20
            while wanted not in shown[before:] and time.monotonic() < end:
                if select.select([process.stdout], [], [], 0.1)[0]:
                    shown += os.read(process.stdout.fileno(), 4096).decode(errors="replace")
            if wanted not in shown[before:]:
                break
        process.kill()  # its terminal goes with it, and so the shell
    assert wanted in shown[before:], f"no {wanted!r} after {text!r} in {shown!r}"
    return shown


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_options_names_and_files(shell, file):
    keys = [
        ("python -m tr\t", "train "),
        ("--ar\t", "--arch "),
        ("batchtopk,mat\t", "batchtopk,matryoshka "),
        ("--target cl\t", "clean "),
        ("--cache completions/scr\t", "ipt.py"),
    ]
    assert "matryoshka" in typed(shell, file, keys)


def replies(file: Path, words: list[str], before: str = "") -> list[str]:
    """What the function answers in bash for a command line whose last word is being typed."""
    program = f"""{before}
source {file}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_granary python "${{COMP_WORDS[$COMP_CWORD]}}" "${{COMP_WORDS[$COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program, "bash", *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("name", commands())
def test_every_option_of_every_command_is_offered(file, name):
    assert replies(file, ["python", "-m", *name.split(), "--"]) == options(commands()[name])


def test_rooms_and_their_commands_are_offered(file):
    assert replies(file, ["python", "-m", ""]) == list(ROOMS)
    assert replies(file, ["python", "-X", "dev", "-m", "har"]) == ["harvest"]
    assert {"info", "verify", "transcode"} <= set(replies(file, ["python", "-m", "cache_spec", ""]))
    assert replies(file, ["python", "-m", "cache_spec", "ver"]) == ["verify"]
    assert replies(file, ["python", "-m", "harvest", ""]) == []


def test_names_are_offered_after_an_equals_sign_too(file):
    assert replies(file, ["python", "-m", "train", "--device", "="]) == ["cpu", "cuda", "mps"]
    assert replies(file, ["python", "-m", "train", "--device", "=", "cu"]) == ["cuda"]


def test_all_else_that_python_does_is_left_to_what_completed_it_before(file):
    before = "_theirs() { COMPREPLY=(theirs); }; complete -F _theirs python"
    for words in (["scr"], ["-m", "http.server", "--"], ["-m", "ht"], []):
        assert replies(file, ["python", *words], before) == ["theirs"]
        assert replies(file, ["python", *words]) == []
    assert replies(file, ["python", "-m", "train", "--ar"], f"{before}; source {file}") == ["--arch"]  # sourced twice


@pytest.mark.parametrize("key", VALUES)
def test_names_are_of_options_that_exist_and_are_explained_where_they_are(key):
    name, option = key.rsplit(" ", 1)
    (parameter,) = (parameter for parameter in commands()[name].params if option in parameter.opts)
    assert not [value for value in VALUES[key] if value.rstrip("=") not in parameter.help]


def test_the_command_prints_the_script(capsys):
    from completions.__main__ import completions

    completions()
    assert capsys.readouterr().out == script()
