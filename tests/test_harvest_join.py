"""Processes that come, go, die and fall asleep make one cache together, the same as one process alone."""

import os
import subprocess
import sys
from pathlib import Path

from cache_fixtures import scratch
from harvest_fixtures import save_model, write_text

JOINER = Path(__file__).parent / "harvest_joiner.py"


def test_a_crew_that_changes_makes_the_cache_that_one_process_makes(tmp_path):
    """Killed with -9: in each way of sharing, on one machine and on several. The program checks every byte."""
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt", 400)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with scratch() as folder:
        command = [sys.executable, str(JOINER), str(folder), str(model), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    tried = done.stdout.splitlines()
    assert sum(line.startswith("one of three killed") for line in tried) == 6
    assert sum(line.startswith("two came late") for line in tried) == 2
    assert tried[-1] == "one slept while its shard was made by another"
