"""What is wrong with a command line that torchrun gave to several processes, said by one of them for each machine."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
PATIENCE_S = 30.0
_USAGE = 2  # the exit code


def leave_usage_to_the_first(app: Callable[[], Any]) -> None:
    """Ends the process without a word if its command line is wrong and the first rank of this machine says so too.

    Whether a command line can be read depends on nothing else (no option of ours looks at the disk or the environment
    meanwhile). So a rank whose launcher gave it the very words that the launcher gives to all has no error of its own,
    and waits for the signal with which torchrun ends it when the first rank has ended; if it ended before, torchrun
    would not let the first one speak. Any other rank speaks for itself, and so does one that gets no signal.
    """
    import typer

    main, named = (app.func, app.keywords.get("prog_name")) if isinstance(app, partial) else (app, None)
    arguments = sys.argv[1:]
    if not isinstance(main, typer.Typer) or "--help" in arguments:
        return
    if not is_of_many(arguments, os.environ, words_of(os.getppid())):
        return
    wrong: Any = typer.BadParameter.__mro__[1]  # all usage errors of typer, which hands on no name for them
    try:
        typer.main.get_command(main).make_context(named or "", list(arguments))
    except wrong:
        try:
            time.sleep(PATIENCE_S)
        except KeyboardInterrupt:
            raise SystemExit(_USAGE) from None


def is_of_many(arguments: Sequence[str], environ: Mapping[str, str], launcher: Sequence[str]) -> bool:
    """Whether a process that was started by `launcher` has the command line that the first rank of its machine has.

    torchrun may be told to put a rank's number into its words; those are other words than the launcher's own.
    """
    if environ.get("LOCAL_RANK", "0") == "0":
        return False
    before, same = launcher[: len(launcher) - len(arguments)], launcher[len(launcher) - len(arguments) :]
    return list(same) == list(arguments) and any(Path(word).name in LAUNCHERS for word in before)


def words_of(process: int) -> list[str]:
    """The command line of a process, as far as this system tells."""
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []
