"""kill -9 at random moments of harvests side by side: nothing half-made looks whole, the resumed cache is the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

from cache_fixtures import scratch
from harvest_fixtures import save_model, write_text

KILLER = Path(__file__).parent / "harvest_killer.py"
CREWS = (2, 3)  # one alone is struck in tests/faults
N_KILLS = 10


def test_killed_harvests_resume_to_the_same_bytes(tmp_path):
    """A starting process takes seconds, so a program loads the model once and forks the ones that are killed."""
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt", 400)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with scratch() as folder:
        command = [sys.executable, KILLER, folder, model, text, str(N_KILLS), *map(str, CREWS)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for n, line in zip(CREWS, done.stdout.splitlines(), strict=True):
        kills = re.match(rf"(\d+) kills of {n} ", line)
        assert kills is not None
        assert int(kills[1]) >= N_KILLS
        assert "some shards" in line, "no kill met a harvest in progress"
