"""Progress: a bar on a terminal, few lines in a log, and never a wrong count."""

import sys

import pytest

from cache_spec import Progress
from cache_spec.progress import _clock


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands where the test sets it."""
    now = [100.0]
    monkeypatch.setattr("cache_spec.progress.time.monotonic", lambda: now[0])
    return now


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(capsys, clock):
    with Progress("harvest", 100, "rows") as progress:
        for _ in range(100):
            clock[0] += 0.25
            progress.advance()
    found = lines(capsys)
    assert len(found) == 6  # every five seconds of 25, and the end
    assert found[0].startswith("harvest: 20/100 rows (4.0/s, 0:20 left")
    assert found[-1].startswith("harvest: 100/100 rows (4.0/s, 0:00 left")


def test_the_last_note_is_shown(capsys, clock):
    with Progress("train", 10, "steps") as progress:
        progress.advance(4, "loss 2.0")
        clock[0] += 10
        progress.advance(3)
    assert "7/10 steps" in lines(capsys)[0]


def test_nothing_done_prints_nothing(capsys):
    with Progress("train", 10, "steps"):
        pass
    assert lines(capsys) == []


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("harvest", 10, "rows") as progress:
        progress.advance(10, "fast")
    text = capsys.readouterr().err
    assert "harvest" in text
    assert "100%" in text
    assert "10/10" in text


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (75, "1:15"), (3600, "1:00:00"), (90061.4, "25:01:01")])
def test_what_is_left_is_told_in_hours_minutes_and_seconds(seconds, shown):
    assert _clock(seconds) == shown
