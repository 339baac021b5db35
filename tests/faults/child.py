"""Commands in forked children of a warm process, which cost milliseconds, and the faults that strike them."""

import errno
import importlib.util
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import evaluate.__main__
import harvest.__main__
import train.__main__
from cache_spec.command import app_for, run_command
from cache_spec.store import Store

CALLS = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir", "rmdir")  # that change what others see
REQUESTS = (  # of a Store
    *("read", "read_start", "read_range", "size", "sizes"),
    *("put", "put_file", "create", "copy", "delete"),
)
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
PATIENCE_S = 120  # a child that takes longer hangs
_REAL = {name: getattr(os, name) for name in (*CALLS, "close")}
Arm = Callable[["Counter"], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended, and what it said on stderr; `struck`: whether the fault got its chance."""

    code: int  # negative: the signal
    said: str
    struck: bool
    n_calls: int
    n_requests: int  # of an object store
    modules: tuple[str, ...]  # that it imported; empty if it was killed


class Counter:
    """Counts a process' calls of CALLS and its REQUESTS, and does something at one of them."""

    def __init__(self, note: Path) -> None:
        self._note = note
        self.n = 0
        self.strike: Callable[[int, str, tuple], None] = lambda n, name, arguments: None
        self.ask: Callable[[int, str, str], None] = lambda n, name, key: None
        self.requests = itertools.count()  # of many threads
        for name in CALLS:
            setattr(os, name, self._counted(name))
        for name in REQUESTS:
            setattr(Store, name, self._asked(getattr(Store, name)))

    def _counted(self, name: str) -> Callable:
        real = (lambda fd: None) if name == "fsync" else _REAL[name]  # a killed process loses nothing it has written

        def call(*arguments, **options):
            self.strike(self.n, name, arguments)
            self.n += 1
            return real(*arguments, **options)

        return call

    def _asked(self, real: Callable) -> Callable:
        def ask(store: Store, key: str = "", *arguments, **options):
            self.ask(next(self.requests), real.__name__, key)
            return real(store, key, *arguments, **options)

        return ask

    def note(self, word: str) -> None:
        """Tell the parent, past the calls that are counted."""
        fd = _REAL["open"](self._note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _REAL["write"](fd, f"{word}\n".encode())
        _REAL["close"](fd)


def start(commands: Sequence[Sequence[str]], arm: Arm, note: Path, said: int) -> int:
    """A child that runs commands, one after another, until one does not end well; returns its id."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # in the child until the command heeds them
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        return child
    code, before = 1, set(sys.modules)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        counter = Counter(note)
        arm(counter)
        code = next(filter(None, map(_run, commands)), 0)
        counter.note(f"calls {counter.n}")
        counter.note(f"requests {next(counter.requests)}")
        counter.note(f"modules {' '.join(sys.modules.keys() - before)}")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(words: Sequence[str]) -> int:
    """The exit code of `python -m` and these words."""
    module = {"harvest": harvest.__main__, "train": train.__main__, "evaluate": evaluate.__main__}[words[0]]
    sys.argv = [f"python -m {words[0]}", *words[1:]]
    try:
        app = app_for(sys.argv, module.app, getattr(module, "OTHERS", {}))
        run_command(lambda: _heeding(app))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as Python itself would end
        traceback.print_exc()
        return 1
    return 0


def _heeding(app: Callable[[], object]) -> None:
    """Signals come while the command runs; the next one may follow in the same process, as it never does in truth."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        app()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def run(
    commands: Sequence[Sequence[str]],
    arm: Arm = lambda counter: None,
    *,
    meanwhile: Callable[[int], None] = lambda child: None,
) -> Ended:
    """Run commands in a child with a fault armed; `meanwhile` is told its process id while it runs."""
    (ended,) = run_together([commands], arm, meanwhile=meanwhile)
    return ended


def run_together(
    each: Sequence[Sequence[Sequence[str]]],
    arm: Arm = lambda counter: None,
    *,
    meanwhile: Callable[[int], None] = lambda child: None,
) -> list[Ended]:
    """The same for several children at once."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for i, commands in enumerate(each):
            note, said = Path(folder) / f"note{i}", Path(folder) / f"said{i}"
            fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            children.append((start(commands, arm, note, fd), note, said))
            os.close(fd)
        meanwhile(children[0][0])
        return [_ended(*child) for child in children]


def _ended(child: int, note: Path, said: Path) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    notes = note.read_text().splitlines() if note.exists() else []
    found = {word: rest.split() for word, _, rest in (line.partition(" ") for line in notes)}
    n_calls, n_requests = (int(found.get(name, ["0"])[0]) for name in ("calls", "requests"))
    struck, modules = "struck" in notes or code < 0, tuple(found.get("modules", ()))
    return Ended(code, said.read_text(errors="replace"), struck, n_calls, n_requests, modules)


def warm_up(modules: Sequence[str]) -> None:
    """Import what a child had to, so that the next ones need not."""
    for name in sorted(modules):
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def after(seconds: float, number: int, work: Callable[[], object] = lambda: None) -> Callable[[int], None]:
    """Do some work and send a signal (0: none) to the child after a while, unless it has ended."""

    def send(child: int) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(min(0.002, max(0.0, until - time.monotonic())))
        work()
        os.kill(child, number)

    return send


def killed_at(call: int, number: int = signal.SIGKILL) -> Arm:
    """The signal arrives just before a system call."""

    def arm(counter: Counter) -> None:
        def strike(n: int, name: str, arguments: tuple) -> None:
            if n == call:
                counter.note("struck")
                os.kill(os.getpid(), number)

        counter.strike = strike

    return arm


def killed_when(is_time: Callable[[int, str, str], bool]) -> Arm:
    """kill -9 arrives just before the request of a store, of such a number, name and key, for which it is time."""

    def arm(counter: Counter) -> None:
        def ask(n: int, name: str, key: str) -> None:
            if is_time(n, name, key):
                counter.note("struck")
                os.kill(os.getpid(), signal.SIGKILL)

        counter.ask = ask

    return arm


def failing_at(call: int, number: int, names: Sequence[str] = CALLS, *, for_good: bool = False) -> Arm:
    """A system call fails, once or from then on."""

    def arm(counter: Counter) -> None:
        def strike(n: int, name: str, arguments: tuple) -> None:
            if (
                name in names
                and (n >= call if for_good else n == call)
                and not (for_good and _is_harmless(name, arguments))
            ):
                counter.note("struck")
                error = OSError(number, os.strerror(number))
                if name not in ("write", "fsync"):  # those have a descriptor, and the system names no file
                    error.filename = str(arguments[0])
                raise error

        counter.strike = strike

    return arm


def _is_harmless(name: str, arguments: tuple) -> bool:
    """A full disk still opens what is there."""
    return name == "open" and not (len(arguments) > 1 and arguments[1] & os.O_CREAT)


FULL = (errno.ENOSPC, ("open", "write", "fsync", "mkdir", "link"))


def jumping_clock(seed: int) -> Arm:
    """The clock is set to another year, at every look at it."""

    def arm(counter: Counter) -> None:
        rng, real = random.Random(seed), time.time
        counter.note("struck")

        def jumped() -> float:
            return max(0.0, real() + rng.uniform(-30, 30) * 365 * 86400)

        time.time = jumped

    return arm
