"""For every test."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """Caches wait for the disk some sixty times each; no test cuts the power. (Subprocesses do wait.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield
