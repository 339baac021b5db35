"""What strikes training and export from outside at a random moment; test_faults_strikes.py says what is promised."""

import pytest
from strikes import keeps_its_promises


@pytest.mark.parametrize("stage", ["train", "export"])
def test_a_stage_keeps_its_promises_whatever_strikes_it(stage, n_kills, tally, tmp_path):
    keeps_its_promises(stage, n_kills, tally, tmp_path)
