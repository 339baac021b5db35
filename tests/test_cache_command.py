"""How a command ends: one sentence and an exit code for what a user can meet, a traceback for our own defects."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import typer

from cache_spec import CacheDamaged, CacheNotFound, DiskFull, UserError, run_command
from cache_spec.command import heed
from cache_spec.files import write_file


def ending(action, capsys) -> tuple[int, str]:
    """The exit code and stderr of a command that does `action`."""
    with pytest.raises(SystemExit) as caught:
        run_command(action)
    return caught.value.code, capsys.readouterr().err  # type: ignore[return-value]


def raises(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("no"), 2), (CacheNotFound("no"), 2), (CacheDamaged("no"), 1), (DiskFull("no"), 1)],
)
def test_a_user_error_is_one_sentence(error, code, capsys):
    assert ending(raises(error), capsys) == (code, "error: no\n")


USERS = ["ENOSPC", "EDQUOT", "EACCES", "EROFS", "EFBIG", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "EIO"]


@pytest.mark.parametrize("number", [getattr(errno, name) for name in USERS])
def test_a_disk_that_says_no_is_one_sentence(number, capsys):
    code, text = ending(raises(OSError(number, os.strerror(number), "/some/where")), capsys)
    assert code == 1
    assert text.startswith(f"error: {os.strerror(number)}: /some/where;")
    assert text.count("\n") == 1


STOPPED = "error: stopped by Ctrl-C or a signal; what was finished is kept"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130)])
def test_ctrl_c_promises_only_what_is_true_of_every_command(error, capsys):
    assert ending(raises(error), capsys) == (130, f"{STOPPED}\n")


@pytest.mark.parametrize("message", ["", "add --resume to go on from step 7"])
def test_ctrl_c_ends_with_what_the_command_says_of_going_on(message, capsys, monkeypatch):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def train() -> None:
        try:
            raise KeyboardInterrupt  # the user's
        except KeyboardInterrupt as first:
            raise KeyboardInterrupt(*filter(None, [message])) from first

    monkeypatch.setattr("sys.argv", ["train"])
    said = f"{STOPPED}; {message}\n" if message else f"{STOPPED}\n"
    code, text = ending(app, capsys)
    assert (code, text.lstrip("\n")) == (130, said)
    assert ending(raises(KeyboardInterrupt(message)), capsys) == (130, said)


def test_a_limit_on_the_size_of_files_names_the_file_and_leaves_nothing(capsys, tmp_path):
    program = (
        "import resource, pathlib\nfrom cache_spec import run_command\nfrom cache_spec.files import write_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"run_command(lambda: write_file(pathlib.Path({str(tmp_path / 'large')!r}), bytes(2000)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {os.strerror(errno.EFBIG)}: {tmp_path / 'large'}; raise the limit")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_speaks_of_shards_only_where_there_are_shards(capsys, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull, match=r"are free; make room and run the command again$"):
        write_file(tmp_path / "report.json", b"facts")


@pytest.mark.parametrize("error", [RuntimeError("ours"), ValueError("ours"), OSError(errno.EIO, "ours")])
def test_our_own_defects_keep_their_traceback(error):
    with pytest.raises(type(error), match="ours"):
        run_command(raises(error))


def test_a_command_that_ends_well_says_nothing(capsys):
    run_command(lambda: None)
    assert capsys.readouterr().err == ""


def test_a_typer_app_ends_the_same_way(capsys, monkeypatch):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise CacheDamaged("broken")

    monkeypatch.setattr("sys.argv", ["fail"])
    assert ending(app, capsys) == (1, "error: broken\n")


def test_a_signal_that_would_end_the_process_is_heeded_and_an_ignored_one_stays_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        heed(signal.SIGTERM, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
