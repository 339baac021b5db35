"""For the tests of faults: their marker, how many trials each makes, and the table of what came of them."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

KILLS_IN_CI = 60
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def n_kills() -> int:
    """kill -9 over all stages; `make faults TRIALS=1000` sets it, and the other faults grow with it."""
    return int(os.environ.get("GRANARY_FAULT_TRIALS") or KILLS_IN_CI)


@pytest.fixture
def tally(record_property) -> Callable[[str, str, Mapping[str, int]], None]:
    """Count trials: tally(fault, stage, {outcome: how often})."""

    def count(fault: str, stage: str, outcomes: Mapping[str, int]) -> None:
        record_property("trials", json.dumps([fault, stage, dict(outcomes)]))

    return count


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of docs/reliability.md: fault, trials, outcome. A test that failed has none."""
    found: dict[str, list[tuple[str, dict[str, int]]]] = defaultdict(list)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "trials":
                fault, stage, outcomes = json.loads(value)
                found[fault].append((stage, outcomes))
    if not found:
        return
    terminalreporter.write_line("\n| fault | struck | trials | outcome |\n|---|---|---:|---|")
    for fault, rows in found.items():
        total: Counter[str] = Counter()
        for _, outcomes in rows:
            total.update(outcomes)
        stages = ", ".join(dict.fromkeys(stage for stage, _ in rows))
        words = "; ".join(f"{outcome} ({n:,})" if len(total) > 1 else outcome for outcome, n in total.most_common())
        terminalreporter.write_line(f"| {fault} | {stages} | {total.total():,} | {words} |")
