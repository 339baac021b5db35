"""How every granary command ends: whole with exit code 0, or one clear sentence and no traceback."""

import errno
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from cache_spec.errors import DiskFull, UserError
from cache_spec.untrusted import printable

INTERRUPTED = 130  # what a shell reports for Ctrl-C
_STDERR, _AGAIN_S = 2, 0.05
_STOPPED = "stopped by Ctrl-C or a signal; what was finished is kept"
_NO_ROOM = "make room or choose another folder, then run the command again"
_NO_RIGHT = "choose another folder, or one that may be written, then run the command again"
_ALWAYS = {  # what the system says no to, and what a user can do
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EACCES: _NO_RIGHT,
    errno.EROFS: _NO_RIGHT,
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`), then run the command again",
}
_IF_NAMED = {  # the same, where the system names a file; without one it is a defect of ours
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EISDIR: "a file is wanted there; give another path",
    errno.EEXIST: "move it away or give another path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "links lead to each other there; give another path",
    errno.EIO: "the disk failed; check it, or choose another folder",
}


def run_command(app: Callable[[], Any]) -> None:
    """Run a typer app. A UserError, a disk that says no, or Ctrl-C becomes one sentence on stderr and an exit code.

    A scheduler's SIGTERM counts as Ctrl-C. A KeyboardInterrupt may carry what to do to go on, which ends the sentence.
    Any other exception is a defect of ours and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what no terminal shows, and is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    # Interrupted while it is imported, torch would add the statistics of its caches to our one sentence.
    logging.getLogger("torch").setLevel(logging.WARNING)
    try:
        heed(signal.SIGINT, signal.SIGTERM)
        app()
    except UserError as error:
        _stop(str(error), error.exit_code)
    except KeyboardInterrupt as interrupt:
        _stop(_stopped(interrupt), INTERRUPTED)
    except SystemExit as end:  # typer turns Ctrl-C into this
        if end.code == INTERRUPTED:
            _stop(_stopped(end), INTERRUPTED)
        raise
    except OSError as error:
        advice = {**_ALWAYS, **(_IF_NAMED if error.filename else {})}.get(error.errno or 0)
        if advice is None:
            raise
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        _stop(f"{reason}; {advice}", DiskFull.exit_code)


def app_for(arguments: list[str], main: Callable[[], Any], others: dict[str, str]) -> Callable[[], Any]:
    """The typer app that a command line means: one of `others` if its first word is their name, else the main one.

    `others` are names and modules that hold an `app`, imported only when they are asked for. The word is taken out of
    `arguments`, which are the command line's, the program's name first.
    """
    if len(arguments) > 1 and arguments[1] in others:
        name = arguments.pop(1)
        program = f"python -m {Path(arguments[0]).parent.name} {name}"  # in usage lines
        return partial(importlib.import_module(others[name]).app, prog_name=program)
    return main


def examples(*commands: str, others: Iterable[str] = ()) -> str:
    """The end of a --help: commands to copy, each as it is typed, and the commands beside this one, if there are any.

    A command too long for a line has its own ends of lines, each after a backslash.
    """
    lines = "\n".join(f"  {line}" for command in commands for line in command.splitlines())
    beside = f"\n\nCommands beside it, each with its own --help: {', '.join(others)}." if others else ""
    return f"\b\nExamples:\n{lines}{beside}"  # \b: these lines are not wrapped


def heed(*numbers: signal.Signals) -> None:
    """From now on these signals raise KeyboardInterrupt, where they would end the process without a word."""
    for number in numbers:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but not while something is being imported: then the signal comes again a moment later.

    Some libraries run Python from C++ that no exception may leave while they are set up, and the process would abort.
    torch takes seconds. Nothing of a command is open before it is there, so until then the process ends at once, with
    the same sentence and exit code.
    """
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        with suppress(OSError):  # a stderr that is gone
            os.write(_STDERR, f"error: {_STOPPED}\n".encode())
        os._exit(INTERRUPTED)
    if _imports(frame):
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is under way in what the command is at; the command itself may be run by one."""
    while frame is not None and frame.f_code is not run_command.__code__:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


class _Printable(logging.Formatter):
    """Lines of the log; names that a stranger chose are among them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _stopped(end: BaseException) -> str:
    """The sentence for Ctrl-C, and what the KeyboardInterrupt behind `end` says, if anything."""
    seen: BaseException | None = end
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return "; ".join([_STOPPED, *filter(None, [str(seen)])])
        seen = seen.__cause__ or seen.__context__
    return _STOPPED


def _stop(sentence: str, exit_code: int) -> None:
    print(printable(f"error: {sentence}"), file=sys.stderr)
    # CPython remembers a Ctrl-C that came through an `exec` of text (which every dataclass does when it is made) and
    # would end by that signal, whatever the exit code. An `exec` that goes well makes it forget.
    exec("")
    raise SystemExit(exit_code)
