"""Real commands, signalled at a random moment of their lives, the seconds in which Python imports included."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from stages import make_stage

from cache_spec import derive_seed

ROOT = Path(__file__).parents[2]
SIGNALS = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM"}


@pytest.mark.parametrize("name", ["harvest", "train", "evaluate", "export"])
def test_a_signal_while_a_command_starts_leads_to_no_traceback(name, n_kills, tally, tmp_path):
    """Before a command listens, the system ends it without a word; from then on it says one sentence."""
    rng = random.Random(derive_seed("tests/faults/commands", name))
    stage, outcomes = make_stage(name, tmp_path / "inputs"), Counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for i in range(max(2, n_kills // 100)):
        out, number = tmp_path / str(i), list(SIGNALS)[i % 2]
        stage.start(out)
        command = [sys.executable, "-m", *stage.arguments(out)[0]]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(rng.uniform(0.1, 3))
            process.send_signal(number)
            said = process.communicate(timeout=120)[1]
        assert process.returncode in (0, 130, -number), said
        # in the first tenths of a second it is Python alone that runs, and says so in its own way
        assert "Traceback" not in said or "__main__.py" not in said, said
        assert sum(line.startswith("error") for line in said.splitlines()) == (process.returncode == 130), said
        outcomes[{0: "finished", 130: "one sentence, exit code 130"}.get(process.returncode, "ended, no word")] += 1
    tally("SIGINT or SIGTERM while a command starts", name, outcomes)
