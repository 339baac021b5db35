"""Contestants in processes of their own, timed strictly in turn: while one works, all others wait on a pipe.

Libraries whose dependencies conflict cannot share an environment, and a library that is timed alone meets another
machine than one that is timed an hour later. So each gets a process, and each round times all of them once.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

from benchmarks.peers.job import Job
from cache_spec.errors import UserError

WORKER = Path(__file__).parent / "peers" / "worker.py"
LAST_WORDS = 20.0  # seconds that a worker gets to end by itself
# Waiting threads sleep instead of spinning: else those who wait would slow down who is timed.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# glibc keeps freed tensors instead of handing them back page by page. Training asks for that by itself; no peer does,
# nor tells its users to.
KEEPING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


class ContestantGone(UserError):
    """A contestant cannot take part, or broke off."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """Who takes part: the row's name, the job, and the environment whose Python runs it."""

    name: str
    job: Job
    env: Path | None = None
    """A virtual environment's folder; None is the one that runs this."""
    settings: Mapping[str, str] = field(default_factory=lambda: {**WAITING, **KEEPING})
    """Environment variables."""


@dataclass(kw_only=True)
class Result:
    """What is known of an entrant in the end."""

    entrant: Entrant
    seconds: list[float] = field(default_factory=list)
    """Of a step, one a round."""
    settings: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    """FVU and L0 at the start."""
    after: dict[str, float] = field(default_factory=dict)
    """And in the end."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    middle: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Spread(median(values), low, high)


def ratio(of: Result, to: Result) -> Spread:
    """The ratio of two entrants' times round by round, so that a slow moment of the machine meets both."""
    return spread([a / b for a, b in zip(of.seconds, to.seconds, strict=True)])


class Worker:
    """The parent's end of one contestant. Raises ContestantGone, in one sentence, when the other end is no more."""

    def __init__(self, entrant: Entrant, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self.result = Result(entrant=entrant)
        self._process, self._errors = process, errors

    def greet(self) -> None:
        """Wait until it is ready."""
        hello = self._receive()
        if "unsuitable" in hello:
            raise ContestantGone(f"{self.result.entrant.name}: {hello['unsuitable']}")
        self.result.settings, self.result.versions = hello.pop("settings"), hello.pop("versions")
        self.result.before = hello

    def ask(self, order: str) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its last words say more than that
            self._process.stdin.write(f"{order}\n")
            self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        words = [text.strip() for text in self._errors if text.strip()]
        raise ContestantGone(
            f"{self.result.entrant.name}: its process ended with code {code}"
            + (f" and the words {words[-1]!r}" if words else " and without a word")
        )

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def start(entrant: Entrant, n_threads: int | None = None) -> Worker:
    """Run a contestant. Raises ContestantGone if there is no Python in its environment."""
    python = Path(sys.executable) if entrant.env is None else entrant.env / "bin" / "python"
    if not python.exists():
        raise ContestantGone(f"{entrant.name}: {entrant.env} is no virtual environment, for it has no bin/python")
    errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (the worker closes it)
    threads = {} if n_threads is None else {"OMP_NUM_THREADS": str(n_threads)}
    process = subprocess.Popen(
        [str(python), "-P", str(WORKER), json.dumps(asdict(entrant.job))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **entrant.settings, **threads},
    )
    return Worker(entrant, process, errors)


@contextmanager
def running(entrants: Sequence[Entrant], n_threads: int | None = None) -> Iterator[tuple[list[Worker], list[str]]]:
    """Workers that are ready, and why the others are not there."""
    ready, missing = [], []
    with ExitStack() as stack:
        workers: list[Worker] = []
        for entrant in entrants:  # imports take seconds, so all begin before the first is waited for
            try:
                workers.append(start(entrant, n_threads))
                stack.callback(workers[-1].close)
            except ContestantGone as reason:
                missing.append(str(reason))
        for worker in workers:
            try:
                worker.greet()
                ready.append(worker)
            except ContestantGone as reason:
                missing.append(str(reason))
        yield ready, missing


def compete(
    entrants: Sequence[Entrant], *, rounds: int, steps: int, warm_up: int, n_threads: int | None = None
) -> tuple[list[Result], list[str]]:
    """Time `steps` steps of each in every round; gives the results and why others are not among them."""
    with running(entrants, n_threads) as (workers, missing):
        for i in range(warm_up + rounds):
            # every other round the other way about, so that nobody always follows the same neighbour
            for worker in workers if i % 2 == 0 else list(reversed(workers)):
                try:
                    seconds = worker.ask(f"steps {steps}")["seconds"]
                except ContestantGone as reason:
                    missing.append(str(reason))
                    worker.result.seconds.clear()
                    workers = [other for other in workers if other is not worker]
                    continue
                if i >= warm_up:
                    worker.result.seconds.append(seconds)
        for worker in workers:
            worker.result.after = worker.ask("look")
        return [worker.result for worker in workers], missing
