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
GUIDED = ["cache_spec", "train.stored", "train.formats", "train.saelens", "train.run_folder", "train.checkpoint"]
GUIDED += ["train.known", "train.pushing", "train.card", "train.foreign", "evaluate.runs"]


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
        # no alarm of atheris's: each example has one
        options = ["-len_control=0", "-timeout=0", "-rss_limit_mb=6000", "-print_final_stats=1"]
        options += [f"-max_total_time={seconds}", f"-max_len={4 * SEED_BYTES}", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], str(seeds), *options], check.hypothesis.fuzz_one_input)
        atheris.Fuzz()


def main() -> int:
    """Share the time among the targets; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz what reads files of strangers, led by coverage.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="such as plan; default: all")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (it has wheels for Linux); pytest tests/test_house_fuzz.py needs none of it")
        return 2
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if options.one:  # before anything is imported that is to be watched
        run_one(options.targets[0], options.seconds)
        return 0
    from fuzz_targets import names

    if unknown := sorted(set(options.targets) - set(names())):
        parser.error(f"there is no target '{unknown[0]}'; there are {', '.join(names())}")
    targets = options.targets or names()
    failed = [name for name in targets if not _holds(name, max(1, options.seconds // len(targets)))]
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
        print(said[-4000:])
    return not done.returncode


if __name__ == "__main__":
    sys.exit(main())
