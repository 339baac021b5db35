"""For every test."""

import os
import signal
import sys

import pytest
from hypothesis import settings
from store_fixtures import folder_root, proxy, store_server, store_url  # noqa: F401

# How long an example takes says how busy the machine is. All else is as hypothesis chooses it here or in CI.
settings.register_profile("granary", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("granary")

LONGEST = (
    "test_house_readme.py",
    "test_train_parallel.py",
    "test_faults_strikes_runs.py",
    "test_faults_strikes.py",
    "test_faults_shared.py",
    "test_evaluate_order.py",
    "test_train_triton.py",
    "test_harvest_join.py",
    "test_harvest_kill.py",
    "test_house_shell.py",
    "test_train_ranks_sweep.py",
)
"""Files of tests that take half a minute to minutes: first, so that in the end no core waits for another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first; all else stays in its order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """Caches wait for the disk some sixty times each; no test cuts the power. (Subprocesses do wait.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def heed_ctrl_c():
    """Started in the background by a shell, pytest and all it starts would ignore SIGINT, and many tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def as_many_threads():
    """A test that leaves torch with another number of threads changes how sums are rounded in those after it."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    yield
    if before:
        assert sys.modules["torch"].get_num_threads() == before, "set the number of threads back"
