"""`--profile`: a few steps under torch's profiler, their trace in a file, and a table of where their time goes."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from cache_spec.files import write_new_file
from train.loader import MixedBatchLoader
from train.spans import MIX, PARTS, PREFIX, READ, STEP, WAIT, span
from train.stream import Stream

PROFILE = "profile"  # folder beside the runs
_WARM_UP, _MAX_STEPS, _MAX_SAE_STEPS = 3, 10, 200  # the last so that a wide sweep's trace stays small
_IDLE = "idle"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A span that ended. Times are in milliseconds from any moment."""

    part: str
    thread: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class DeviceWork:
    """A kernel or copy on a GPU, and when and from which thread it was launched."""

    thread: int
    launched: float
    milliseconds: float


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Where the time of some steps went, in milliseconds of all of them together."""

    wall: float
    parts: dict[str, float]
    """They add up to `wall`: while several threads work, each one's part has an even share of the moment."""
    n_working: float
    """Threads that worked on SAEs, on average over the time."""
    reading: float
    """Of threads that read ahead, whatever went on meanwhile."""
    device: dict[str, float]
    """Of a GPU, by the part that launched it; empty without one."""


class Timeline:
    """The innermost span that is open on each thread, between the first step's start and the last one's end."""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        steps = [each for each in intervals if each.part == STEP]
        self.start, self.end = min(each.start for each in steps), max(each.end for each in steps)
        inner = [each for each in intervals if each.part != STEP and each.end > each.start]
        ends = [(each.end, 0, 0.0, each) for each in inner]
        starts = [(each.start, 1, -each.end, each) for each in inner]  # of two that start together the outer one first
        self.segments: list[tuple[float, float, dict[int, str]]] = []
        open_: dict[int, list[Interval]] = {}
        before = self.start
        for time, is_start, _, each in sorted(ends + starts, key=lambda entry: entry[:3]):
            time = min(max(time, self.start), self.end)
            if time > before:
                innermost = {thread: spans[-1].part for thread, spans in open_.items() if spans}
                self.segments.append((before, time, innermost))
                before = time
            spans = open_.setdefault(each.thread, [])
            if is_start:
                spans.append(each)
            else:
                spans.remove(each)
        if self.end > before:
            self.segments.append((before, self.end, {}))

    def working(self, innermost: dict[int, str]) -> list[str]:
        """The parts that keep a step from its end, of all threads that work at a moment."""
        return [part for part in innermost.values() if part not in (WAIT, READ)]

    def parts_at(self, time: float, thread: int) -> list[str]:
        """What a launch belongs to. Backward passes launch from a thread of autograd's, which has no span of its own:
        that is work of the step that waits for it."""
        for start, end, innermost in self.segments:
            if start <= time < end:
                return [innermost[thread]] if thread in innermost else self.working(innermost) or [STEP]
        return []


def bill_of(intervals: Sequence[Interval], work: Sequence[DeviceWork] = ()) -> Bill:
    """Add up the spans of whole steps, and what they launched on a GPU."""
    timeline = Timeline(intervals)
    parts: defaultdict[str, float] = defaultdict(float)
    device: defaultdict[str, float] = defaultdict(float)
    working = reading = 0.0
    for start, end, innermost in timeline.segments:
        at_work = timeline.working(innermost)
        for part in at_work or [WAIT if WAIT in innermost.values() else STEP]:
            parts[part] += (end - start) / max(1, len(at_work))
        working += (end - start) * sum(part != MIX for part in at_work)
        reading += (end - start) * sum(part == READ for part in innermost.values())
    for each in work:
        launchers = timeline.parts_at(each.launched, each.thread)
        for part in launchers:
            device[part] += each.milliseconds / len(launchers)
    wall = timeline.end - timeline.start
    return Bill(wall=wall, parts=dict(parts), n_working=working / wall, reading=reading, device=dict(device))


def table(bill: Bill, n_steps: int) -> list[str]:
    """One line a part: milliseconds a step and share of the time; with a GPU the shares are of its time."""
    head = f"  {'part':<24}{'ms a step':>10}"
    if not bill.device:
        lines = [f"{head}{'share':>9}"]
        lines += [
            _line(part, [bill.parts[part] / n_steps], bill.parts[part] / bill.wall) for part in _sorted(bill.parts)
        ]
        return [*lines, _line("all", [bill.wall / n_steps], 1.0)]
    lines = [f"{head}{'on device':>11}{'share':>9}"]
    shown = {**bill.parts, **bill.device}
    for part in _sorted(shown):
        on_device = bill.device.get(part, 0.0)
        lines.append(_line(part, [bill.parts.get(part, 0.0) / n_steps, on_device / n_steps], on_device / bill.wall))
    idle = max(0.0, bill.wall - sum(bill.device.values()))  # below 0 where a copy runs beside a kernel
    lines.append(_line(_IDLE, [0.0, idle / n_steps], idle / bill.wall))
    return [*lines, _line("all", [bill.wall / n_steps] * 2, 1.0)]


def _sorted(parts: dict[str, float]) -> list[str]:
    return [part for part in (*PARTS, READ) if part in parts]


def _line(part: str, milliseconds: list[float], share: float) -> str:
    first, *more = (f"{value:.3f}" for value in milliseconds)
    return f"  {part:<24}{first:>10}{''.join(f'{text:>11}' for text in more)}{share:>9.1%}"


@contextmanager
def profiling(
    folder: Path | None, loader: MixedBatchLoader, stream: Stream, steps: range, n_saes: int
) -> Iterator[Callable[[int, int], None]]:
    """Gives what is to be called before each of `steps` with its number and the SAEs that take part.

    After a short warm-up it profiles at most ten steps, fewer if the run is short or the sweep wide, prints the table
    and writes the trace into the folder. Without a folder it does nothing.
    """
    if folder is None:
        yield lambda step, n: None
        return
    warm_up = min(_WARM_UP, len(steps) - 1)
    n_steps = min(_MAX_STEPS, max(1, _MAX_SAE_STEPS // n_saes), len(steps) - warm_up)
    profile = _Profile(folder, loader, stream, steps[warm_up : warm_up + n_steps])
    try:
        yield profile.begin_step
        profile.finish()
    finally:
        profile.stop()


class _Profile:
    """The profiler of a few steps."""

    def __init__(self, folder: Path, loader: MixedBatchLoader, stream: Stream, steps: range) -> None:
        self._folder, self._loader, self._stream, self._steps = folder, loader, stream, steps
        self._step, self._n_done, self._n_sae_steps = ExitStack(), 0, 0
        self._waited, self._n_late = 0.0, 0
        self._profiler: torch.profiler.profile | None = None

    def begin_step(self, step: int, n_saes: int) -> None:
        if step not in self._steps:
            self.finish()
            return
        self._step.close()
        if self._profiler is None:
            self._start()
        self._step.enter_context(span(STEP))
        self._n_done += 1
        self._n_sae_steps += n_saes

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._loader.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._loader.device)  # what was launched before is not ours
        # SAEs are stepped on threads of their own, which torch's profiler leaves out unless told so
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True, experimental_config=everywhere)
        self._profiler.start()
        self._waited, self._n_late = self._stream.waited, self._stream.n_late

    def stop(self) -> None:
        """End the profiler, if it runs, and forget what it saw."""
        self._step.close()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def finish(self) -> None:
        """End the profiler, if it runs; write the trace and print the table."""
        if self._profiler is None:
            return
        if self._loader.device.type == "cuda":
            torch.cuda.synchronize(self._loader.device)
        waited, n_late = self._stream.waited - self._waited, self._stream.n_late - self._n_late
        profiler = self._profiler
        self.stop()
        first = self._steps.start + 1
        path = _write(profiler, self._folder, f"steps_{first}-{first + self._n_done - 1}")
        events = profiler.events() or []
        bill = bill_of(_intervals(events), _device_work(events))
        n, seconds = self._n_done, bill.wall / 1e3
        rate = n * self._loader.data.batch_size / seconds
        print(
            f"profile   steps {first:,} to {first + n - 1:,} of {self._loader.n_steps:,}, {self._n_sae_steps / n:.4g} "
            f"SAEs: {bill.wall / n:.2f} ms a step, {rate:,.0f} tokens/s",
            *table(bill, n),
            f"rows      nothing to do but wait for them {bill.parts.get(WAIT, 0.0) / bill.wall:.1%} of the time; asked "
            f"for a step ahead, {n_late} of {n} came late, by {1e3 * waited / n:.2f} ms a step; reading them took "
            f"{bill.reading / n:.2f} ms a step, on threads of its own",
            f"threads   {bill.n_working:.2f} worked on SAEs at a time",
            f"trace     {path}, for ui.perfetto.dev or chrome://tracing; spans start with '{PREFIX.strip()}'",
            sep="\n",
            flush=True,
        )


def _intervals(events: Sequence[Any]) -> list[Interval]:
    """Our spans among a profiler's events."""
    return [
        Interval(
            part=event.name.removeprefix(PREFIX),
            thread=event.thread,
            start=event.time_range.start / 1e3,
            end=event.time_range.end / 1e3,
        )
        for event in events
        if event.name.startswith(PREFIX) and event.device_type == DeviceType.CPU
    ]


def _device_work(events: Sequence[Any]) -> list[DeviceWork]:
    """Kernels and copies among a profiler's events, by the operations that launched them; not the spans' own shadows on
    the device."""
    return [
        DeviceWork(thread=event.thread, launched=event.time_range.start / 1e3, milliseconds=kernel.duration / 1e3)
        for event in events
        if event.device_type == DeviceType.CPU
        for kernel in event.kernels
        if not kernel.name.startswith(PREFIX)
    ]


def _write(profiler: torch.profiler.profile, folder: Path, name: str) -> Path:
    """The trace under that name, or with a number behind it if another one has the name."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "trace.json.gz"  # torch packs it because of the name
        profiler.export_chrome_trace(str(made))
        data = made.read_bytes()
    n, path = 1, folder / f"{name}.json.gz"
    while not write_new_file(path, data):
        n += 1
        path = folder / f"{name}_{n}.json.gz"
    return path
