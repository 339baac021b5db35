"""Trials of a fault against a stage, and what is promised of each: nothing committed is lost, nothing torn is accepted,
every message names the file and the remedy, exit code 1 or 2 (130 for a signal), no traceback."""

import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from child import Arm, Ended, after, run, run_together, warm_up
from stages import Stage, Wrong

from cache_spec import derive_seed

REMEDY = (
    r"\b(run|delete|give|make|choose|check|raise|move|name|wait|add|harvest|train|put|see|say|download|use|goes on)\b"
)
CHAIN = 6  # faults in a row before a command is let through
Judge = Callable[["Trials", Ended], str]


@dataclass
class Trials:
    """A fault, a stage, and what came of each trial."""

    fault: str
    stage: Stage
    folder: Path
    n: int  # wanted
    outcomes: Counter = field(default_factory=Counter)
    rng: random.Random = field(init=False)
    _attempt: int = 0
    _out: Path | None = None
    _in_chain: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(derive_seed("tests/faults", self.fault, self.stage.name))

    @property
    def n_done(self) -> int:
        return sum(self.outcomes.values())

    def strike(
        self,
        arm: Arm,
        judge: Judge,
        meanwhile: Callable[[int], None] = lambda child: None,
        undo: Callable[[], object] = lambda: None,
    ) -> None:
        """One trial, if the fault strikes, on what the trial before it left; then the fault is undone."""
        out = self.out()
        before = self.stage.seen(out)
        ended = run(self.stage.arguments(out), arm, meanwhile=meanwhile)
        undo()
        self._keeps(before, out)
        if ended.struck:
            self.outcomes[judge(self, ended)] += 1
            self._in_chain += 1
        elif ended.code:
            raise Wrong(f"{self.fault}: {self.stage.name} ended with {ended.code} by itself: {ended.said[-2000:]}")
        if ended.code == 0 or self._in_chain >= CHAIN:
            self.mend()

    def strike_together(self, seconds: float) -> None:
        """The command twice at once, the second a while after the first: one may be told to wait or to stay away."""
        out = self.out()
        commands = self.stage.arguments(out)
        ended = run_together([commands, commands], lambda counter: time.sleep(seconds * self.rng.random()))
        for one in ended:
            if one.code not in (0, 2):
                raise Wrong(f"{self.fault}: {self.stage.name} ended with {one.code}: {one.said[-2000:]}")
            if one.code:
                one_sentence(self, one)
        if all(one.code for one in ended):
            raise Wrong(f"{self.fault}: {self.stage.name} refused both: {ended[0].said[-2000:]}")
        self.stage.check_whole(out)
        refused_one = any(one.code for one in ended)
        self.outcomes["one did it, one sentence to the other" if refused_one else "both ended well"] += 1
        self.mend()

    def strike_one_of_two(self, seconds: float) -> None:
        """The command twice at once, and kill -9 of one of them: the other makes all that is missing."""
        out = self.out()
        commands = self.stage.arguments(out)
        struck, other = run_together([commands, commands], meanwhile=after(seconds, signal.SIGKILL))
        if other.code:
            raise Wrong(f"{self.fault}: {self.stage.name} ended with {other.code}: {other.said[-2000:]}")
        if missing := self.stage.seen(self.stage.whole).keys() - self.stage.seen(out).keys():
            raise Wrong(f"{self.fault}: {self.stage.name} left undone what the killed one was at: {sorted(missing)}")
        if struck.struck:
            self.outcomes[f"the other made the rest, {killed(self, struck).partition('to ')[2]}"] += 1
        self.mend()

    def out(self) -> Path:
        """Where the stage is at work now."""
        if self._out is None:
            self._attempt += 1
            self._out = self.folder / f"{self.stage.name} {self.fault} {self._attempt}".replace(" ", "_")
            self.stage.start(self._out)
        return self._out

    def mend(self) -> None:
        """The same command without a fault makes the same bytes as if there had been none."""
        if self._out is None:
            return
        ended = run(self.stage.arguments(self._out))
        if ended.code:
            raise Wrong(f"{self.fault}: {self.stage.name} does not go on afterwards: {ended.said[-2000:]}")
        self.stage.check_whole(self._out)
        shutil.rmtree(self._out)
        self._out, self._in_chain = None, 0

    def _keeps(self, before: dict[str, int], out: Path) -> None:
        seen = self.stage.seen(out)
        if lost := sorted(name for name, step in before.items() if seen.get(name, 0) < step):
            raise Wrong(f"{self.fault}: {self.stage.name} lost what was committed: {lost[:5]}")


def killed(trials: Trials, ended: Ended) -> str:
    """kill -9 leaves no say."""
    if ended.code != -signal.SIGKILL:
        raise Wrong(f"{trials.fault}: ended with {ended.code}: {ended.said[-2000:]}")
    return "went on to the same bytes"


def stopped(trials: Trials, ended: Ended) -> str:
    """A signal that asks leads to one sentence and 130, or the work is finished."""
    if ended.code == 0:
        return "finished all the same"
    if ended.code != 130:
        raise Wrong(f"{trials.fault}: {trials.stage.name} ended with {ended.code}: {ended.said[-2000:]}")
    one_sentence(trials, ended)
    return "one sentence, exit code 130, went on to the same bytes"


def refused(trials: Trials, ended: Ended) -> str:
    """What the system refuses leads to one sentence that names the file and what to do, unless it was no harm."""
    if ended.code == 0:
        return "no harm, the same bytes"
    if ended.code not in (1, 2):
        raise Wrong(f"{trials.fault}: {trials.stage.name} ended with {ended.code}: {ended.said[-2000:]}")
    sentence = one_sentence(trials, ended)
    if str(trials.folder) not in sentence or not re.search(REMEDY, sentence):
        raise Wrong(f"{trials.fault}: no file or no remedy in: {sentence}")
    return f"one sentence, exit code {ended.code}, went on to the same bytes"


def unharmed(trials: Trials, ended: Ended) -> str:
    """What does not concern the command."""
    if ended.code:
        raise Wrong(f"{trials.fault}: {trials.stage.name} ended with {ended.code}: {ended.said[-2000:]}")
    return "no harm, the same bytes"


def one_sentence(trials: Trials, ended: Ended) -> str:
    """The last line of stderr, which has to be the only one that says error."""
    lines = ended.said.rstrip().splitlines()
    errors = [line for line in lines if line.lower().startswith("error")]
    if "Traceback" in ended.said or len(errors) != 1 or lines[-1] != errors[0]:
        raise Wrong(f"{trials.fault}: {trials.stage.name} did not say one sentence: {ended.said[-3000:]}")
    return errors[0]


def prepare(stage: Stage, folder: Path) -> tuple[float, int]:
    """Run the stage without a fault, first to warm up; its seconds and its counted calls."""
    for name in ("cold", "whole"):
        out = folder / f"{name}_{stage.name}"
        stage.start(out)
        begin = time.monotonic()
        ended = run(stage.arguments(out))
        seconds = time.monotonic() - begin
        if ended.code:
            raise Wrong(f"{stage.name} does not work without a fault: {ended.said[-2000:]}")
        warm_up(ended.modules)
    stage.bring(out)
    stage.whole, stage.n_requests = out, ended.n_requests
    return seconds, ended.n_calls


def until(trials: Trials, once: Callable[[], None], most: int = 4) -> Trials:
    """Repeat a trial until enough of them struck."""
    for _ in range(most * trials.n + 10):
        if trials.n_done >= trials.n:
            break
        once()
    trials.mend()
    if trials.n_done < trials.n:
        raise Wrong(f"{trials.fault}: struck {trials.stage.name} only {trials.n_done} of {trials.n} times")
    return trials


def names_of(faults: Sequence[str]) -> dict[str, int]:
    """`kill=20 eio=5` -> how many of each."""
    return {name: int(n) for name, _, n in (text.partition("=") for text in faults)}
