"""How every granary command ends: whole with exit code 0, or one clear sentence and no traceback."""

import errno
import logging
import sys
from collections.abc import Callable
from typing import Any

from cache_spec.errors import DiskFull, UserError

INTERRUPTED = 130  # what a shell reports for Ctrl-C
_STOPPED = "stopped by Ctrl-C; what was finished is kept, and the same command goes on from there"


def run_command(app: Callable[[], Any]) -> None:
    """Run a typer app. A UserError, a full disk or Ctrl-C becomes one sentence on stderr and an exit code.

    Any other exception is a defect of ours and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except UserError as error:
        _stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        _stop(_STOPPED, INTERRUPTED)
    except SystemExit as end:  # typer turns Ctrl-C into this
        if end.code == INTERRUPTED:
            _stop(_STOPPED, INTERRUPTED)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        _stop(f"{reason}; make room or choose another folder, then run the same command again", DiskFull.exit_code)


def _stop(sentence: str, exit_code: int) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(exit_code)
