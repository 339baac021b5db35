"""The benchmark of loaders at toy size: it runs, and its table is made of what it says."""

import re
import stat
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import loader as benchmark

TOY = ["--d-model", "8", "--batch-size", "256", "--rows", "2048", "--shard-rows", "1024", "--rounds", "2"]


def environment(folder: Path, answers: str) -> Path:
    """A folder that looks like a virtual environment; its python runs what is given instead of SAELens."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\nimport sys\n{answers}")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return folder


def rows_of(table: str) -> dict[str, list[float]]:
    """The numbers beside each name."""
    found = re.findall(r"^(\S.*?) {2,}([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+) to ([\d.]+)$", table, re.MULTILINE)
    return {name: [float(number.replace(",", "")) for number in numbers] for name, *numbers in found}


def test_everything_here_is_in_the_table_and_what_is_not_here_is_said():
    done = CliRunner().invoke(benchmark.app, TOY)
    assert done.exit_code == 0, done.output
    assert "SAELens is left out; name an environment that has it with --saelens" in done.output
    assert "2,048 rows of 8, batch 256, masked 0.5, 2 readers" in done.output
    table = rows_of(done.output)
    assert list(table) == [
        "memcpy, 1 thread",
        "memcpy, 2 threads",
        "granary, buffers, mmap",
        "granary, buffers, pread",
        "granary, float32",
        "granary, float32, mixtures 0 and 0.5",
        "np.memmap, rows in order, float32",
        "np.memmap, random rows, float32",
        "memmap DataLoader, shuffled, fp16",
        "memmap DataLoader, shuffled, fp16, 2 workers",
    ]
    ruler = table["memcpy, 1 thread"][0]
    for rate, _, ratio, low, high in table.values():
        assert ratio == pytest.approx(rate / ruler, rel=0.01, abs=1e-3)
        assert low <= ratio <= high


def test_saelens_answers_from_its_own_environment(tmp_path):
    answers = "print('1.2.3', flush=True)\nfor line in sys.stdin:\n    print(2.0, flush=True)"
    done = CliRunner().invoke(benchmark.app, [*TOY, "--saelens", str(environment(tmp_path, answers))])
    assert done.exit_code == 0, done.output
    for n_mixed in benchmark.SAELENS_BUFFERS:
        rate = rows_of(done.output)[f"SAELens 1.2.3, cached, fp16, mixing {n_mixed} batches"][0]
        assert rate == benchmark.SAELENS_BATCHES * 256 / 2


@pytest.mark.parametrize(
    ("answers", "words"),
    [("", "cannot run SAELens's loader"), ("print('1.2.3', flush=True)\nsys.stdin.readline()", "ended early")],
)
def test_an_environment_without_saelens_is_an_error_and_not_a_missing_row(tmp_path, answers, words):
    done = CliRunner().invoke(benchmark.app, [*TOY, "--saelens", str(environment(tmp_path, answers))])
    assert words in str(done.exception)
    done = CliRunner().invoke(benchmark.app, [*TOY, "--saelens", str(tmp_path / "nowhere")])
    assert "has no bin/python" in str(done.exception)
