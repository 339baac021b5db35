"""Fuzzing led by coverage: `python tests/fuzz_guided.py [--seconds 300] [TARGET ...]`, or `make fuzz`.

Each target gets its share of the time in a process of its own, in which atheris mutates what the same strategies draw
that tests/test_house_fuzz.py uses, and keeps what reaches new code. Exit code 1 if any target failed; what failed is
printed with its input. Without atheris, which has wheels for some systems only, it says so and ends with 2.
"""

import argparse
import importlib.util
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
N_SEEDS, SEED_BYTES = 64, 1024
MOST_SHOWN = 4000  # letters from the beginning and from the end of what a failed target printed
GUIDED = ["cache_spec", "train.stored", "train.formats", "train.saelens", "train.run_folder", "train.checkpoint"]
GUIDED += ["train.known", "train.pushing", "train.card", "train.foreign", "train.facts", "train.preparing"]
GUIDED += ["train.entry", "train.report", "evaluate.runs", "evaluate.kept"]


def run_one(name: str, seconds: int) -> None:
    """Fuzz one target in this process until the time is over or something fails."""
    import atheris

    with atheris.instrument_imports(include=GUIDED):
        from fuzz_targets import target
    from hypothesis import HealthCheck, given, settings

    with tempfile.TemporaryDirectory() as folder:
        found = target(name, Path(folder) / "made")

        @settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
        @given(found.drawn)
        def check(value: object) -> None:
            found.use(value)

        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for i in range(N_SEEDS):  # few bytes make no document
            (seeds / str(i)).write_bytes(random.Random(i).randbytes(SEED_BYTES))
        atheris.Setup([sys.argv[0], str(seeds), *options(seconds, folder)], check.hypothesis.fuzz_one_input)
        atheris.Fuzz()


def options(seconds: int, folder: str) -> list[str]:
    """What atheris is told. Its own alarm never comes, for each example has one, and 0 would be an alarm of a second:
    the first example makes hypothesis's table of all letters, which takes ten where there is no .hypothesis."""
    told = ["-len_control=0", f"-timeout={10**6}", "-rss_limit_mb=6000", "-print_final_stats=1"]
    return [*told, f"-max_total_time={seconds}", f"-max_len={4 * SEED_BYTES}", f"-artifact_prefix={folder}/"]


def cause(said: str) -> str:
    """What a failed target printed, as far as it tells why: from a little before the first word of it, and the end."""
    lines = said.splitlines()
    first = next((i for i, line in enumerate(lines) if re.search("Timeout|Uncaught|ERROR|Traceback", line)), None)
    if first is None:
        return said[-MOST_SHOWN:]
    shown = "\n".join(lines[max(0, first - 3) :])
    if len(shown) <= 2 * MOST_SHOWN:
        return shown
    return f"{shown[:MOST_SHOWN]}\n[...]\n{shown[-MOST_SHOWN:]}"


def main() -> int:
    """Share the time among the targets; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz what reads files of strangers, led by coverage.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="such as plan; default: all")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (it has wheels for Linux); pytest tests/test_house_fuzz.py needs none of it")
        return 2
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if given.one:  # before anything is imported that is to be watched
        run_one(given.targets[0], given.seconds)
        return 0
    from fuzz_targets import names

    if unknown := sorted(set(given.targets) - set(names())):
        parser.error(f"there is no target '{unknown[0]}'; there are {', '.join(names())}")
    targets = given.targets or names()
    failed = [name for name in targets if not _holds(name, max(1, given.seconds // len(targets)))]
    named = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{len(targets) - len(failed)} of {len(targets)} targets held{named}")
    return 1 if failed else 0


def _holds(name: str, seconds: int) -> bool:
    began = time.monotonic()
    command = [sys.executable, __file__, "--one", "--seconds", str(seconds), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    n_tried = next((line.split()[-1] for line in said.splitlines() if "number_of_executed_units" in line), "?")
    n_ways = max((int(found) for found in re.findall(r"ft: (\d+)", said)), default=0)
    verdict = "FAILED" if done.returncode else "held"
    print(
        f"{name:<34}{n_tried:>8} tries, {n_ways:>6} ways through, {time.monotonic() - began:>5.0f} s  {verdict}",
        flush=True,
    )
    if done.returncode:
        print(cause(said))
    return not done.returncode


if __name__ == "__main__":
    sys.exit(main())
