"""Programs run on a terminal of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_WIDE = 'stty cols 200 rows 50; exec "$@"'
_SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def on_terminal(*command: object, **environment: str) -> subprocess.Popen[bytes]:
    """The program, with a wide terminal in place of stdin, stdout and stderr; what is written to it is typed there."""
    return subprocess.Popen(
        [sys.executable, "-c", _SPAWN, "sh", "-c", _WIDE, "sh", *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
