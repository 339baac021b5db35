"""What strikes a command from outside at a random moment: kill -9, signals, a disk that fails, is full or read-only,
another time, the same command once more. Nothing committed is lost, nothing torn is accepted, and the command then goes
on to the same bytes."""

import pytest
from strikes import keeps_its_promises


@pytest.mark.parametrize("stage", ["harvest", "evaluate"])
def test_a_stage_keeps_its_promises_whatever_strikes_it(stage, n_kills, tally, tmp_path):
    keeps_its_promises(stage, n_kills, tally, tmp_path)
