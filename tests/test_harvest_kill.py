"""kill -9 at random moments of a harvest: nothing half-made looks whole, and the resumed cache is the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cache_fixtures import scratch
from harvest_fixtures import save_model, write_text

KILLER = Path(__file__).parent / "harvest_killer.py"
N_KILLS = 20


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_killed_harvests_resume_to_the_same_bytes(n_processes, tmp_path):
    """A starting process takes seconds, so a program loads the model once and forks the ones that are killed."""
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt", 400)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with scratch() as folder:
        command = [sys.executable, str(KILLER), str(folder), str(model), str(text), str(n_processes), str(N_KILLS)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kills = re.search(r"(\d+) kills", done.stdout)
    assert kills is not None
    assert int(kills[1]) >= N_KILLS
    assert "some shards" in done.stdout, "no kill met a harvest in progress"
