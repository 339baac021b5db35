"""Bad input: whatever a file of a stranger says, a UserError comes out, soon and without much memory.

FUZZ_EXAMPLES=500 tries so many of each target; tests/fuzz_guided.py is led by coverage.
"""

import os

import pytest
from fuzz_guided import cause, options
from fuzz_targets import names, target
from hypothesis import HealthCheck, Phase, given, settings

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # to shrink a whole document takes minutes
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]  # a whole document is drawn
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", names())
@pytest.mark.filterwarnings("default")  # torch says so when it turns complex numbers into plain ones
def test_a_changed_file_is_used_or_refused(name, folder):
    found = target(name, folder)

    @settings(
        max_examples=EXAMPLES,
        phases=PHASES,
        deadline=None,
        suppress_health_check=SLOW,
    )
    @given(found.drawn)
    def check(value):
        found.use(value)

    check()


def test_no_alarm_of_atheris_ends_an_example_before_its_own(tmp_path):
    alarm = next(int(option.partition("=")[2]) for option in options(3600, str(tmp_path)) if "-timeout=" in option)
    assert alarm > 3600


@pytest.mark.parametrize("word", ["=== Timeout: 1s elapsed, timeout=0s ===", "=== Uncaught Python exception: ==="])
def test_what_a_failed_target_prints_says_why_however_much_follows(word):
    said = "\n".join(["INFO: seed corpus"] * 1000 + [word, "ValueError: why"] + ["stack"] * 5000 + ["the last line"])
    assert word in cause(said)
    assert "ValueError: why" in cause(said)
    assert "the last line" in cause(said)
    assert len(cause(said)) < 10_000
    assert cause("nothing of the kind") == "nothing of the kind"
