"""How a command ends: one sentence and an exit code for what a user can meet, a traceback for our own defects."""

import errno
import os

import pytest
import typer

from cache_spec import CacheDamaged, CacheNotFound, DiskFull, UserError, run_command


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_written_is_one_sentence(number, capsys):
    code, text = ending(raises(OSError(number, os.strerror(number), "/some/where")), capsys)
    assert code == 1
    assert text.startswith(f"error: {os.strerror(number)}: /some/where;")
    assert text.count("\n") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130)])
def test_ctrl_c_says_that_nothing_is_lost(error, capsys):
    code, text = ending(raises(error), capsys)
    assert code == 130
    assert "Ctrl-C" in text


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
