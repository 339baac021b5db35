"""The soak: what grows is named, what is flat passes, and the picture shows it from zero up."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from typer.main import get_command

from benchmarks import soak
from benchmarks.soak import QUANTITIES, Grown, Sample, grown, growth, picture, table
from completions.commands import commands

FIRST = Sample(minutes=0.0, memory=500.0, files=10, threads=4, disk=0.0, round_disk=30.0)


def rounds(n: int, **slopes: float) -> list[Sample]:
    """Rounds in which each quantity named grows by so much a round, and memory doubles while it warms up."""
    found = []
    for i in range(n):
        changes = {name: getattr(FIRST, name) + slope * max(0, i - 2) for name, slope in slopes.items()}
        warm = {"memory": 250.0} if i < 2 else {}
        found.append(replace(FIRST, minutes=i / 2, **{**changes, **warm}))
    return found


def test_flat_rounds_are_flat_whatever_warming_up_took():
    assert grown(rounds(20)) == []
    assert growth(rounds(20), "memory") == pytest.approx(0)


@pytest.mark.parametrize(("name", "slope"), [("memory", 2.0), ("files", 1), ("threads", 1), ("disk", 0.1)])
def test_what_grows_is_named(name, slope):
    found = grown(rounds(20, **{name: slope}))
    assert len(found) == 1
    assert found[0].startswith(f"{QUANTITIES[name]} grew by")


def test_a_single_jump_of_memory_within_its_bound_is_no_leak():
    jumping = rounds(20)
    jumping[10] = replace(jumping[10], memory=520.0)
    assert grown(jumping) == []


@pytest.mark.parametrize("n", [1, 3, 4])
def test_few_rounds_make_a_table_and_a_picture_too(n):
    assert grown(rounds(n)) == []
    assert len(table(rounds(n)).splitlines()) == n + 2
    ET.fromstring(picture(rounds(n)))


def test_the_picture_has_a_line_for_each_quantity_and_a_point_for_each_round():
    drawn = picture(rounds(12, memory=2.0))
    lines = re.findall(r'polyline points="([^"]+)"', drawn)
    assert [len(line.split()) for line in lines] == [12] * len(QUANTITIES)
    assert all(label in drawn for label in QUANTITIES.values())
    heights = [float(point.split(",")[1]) for point in lines[0].split()]
    assert heights[-1] < heights[3], "more is higher up"


def test_a_round_is_of_commands_that_exist_and_of_twelve_saes(tmp_path):
    known = commands()
    for module, arguments in soak.commands(tmp_path):
        known[module.partition(".")[0]].make_context(module, [*arguments])
    arguments = soak.commands(tmp_path)[1][1]
    counts = [len(arguments[arguments.index(name) + 1].split(",")) for name in ("--arch", "--k", "--seed")]
    assert counts[0] * counts[1] * counts[2] == 12


def test_what_a_round_leaves_fails_the_soak(monkeypatch, tmp_path, capsys):
    def leaves(folder):
        folder.mkdir()
        (folder / "written").write_bytes(bytes(2**20))
        (folder.parent / f"left{len(list(folder.parent.iterdir()))}").write_bytes(bytes(2**20))

    monkeypatch.setattr(soak, "run_round", leaves)
    monkeypatch.setattr(soak.time, "monotonic", iter(range(0, 10**6, 20)).__next__)
    with pytest.raises(Grown, match="disk, MiB grew by"):
        get_command(soak.app).main(args=["--minutes", "4", "--out", str(tmp_path / "soak.svg")], standalone_mode=False)
    assert "written MiB" in capsys.readouterr().out
    ET.parse(tmp_path / "soak.svg")
