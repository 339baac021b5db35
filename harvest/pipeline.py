"""The way of a shard from the model to the disk, with everything at once that can be.

While the model runs a batch, the batch before it is copied to the host and put into its shard's rows; and while the
model works on a shard, the shard before it is checksummed, written and committed by a thread. So a harvest holds two
shards in memory.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.layout import FP16_MAX
from cache_spec.plan import Plan
from harvest.pilot import remedy, scale_for
from harvest.prefix import NEVER, WORTH, Batch, Call, choose_batches
from harvest.reader import Reader
from harvest.shard import Shard, ShardBuffer, prepare_shard
from harvest.transfer import Copies, Sent, choose_copies, to_device
from harvest.windows import Windows

WriteShard = Callable[[int, dict[tuple[str, str], np.ndarray], dict[str, np.ndarray]], None]

_MOST_WRITER_THREADS = 8  # then the writing itself is what takes the time


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that the shards depend on; `batch_windows` and the reader's device change no more than rounding."""

    plan: Plan
    windows: Windows
    tokenizer: Tokenizer
    reader: Reader
    batch_windows: int  # windows run at once, each in all variants
    pad: bool = False  # run a short batch at full size and throw the rest away, so that shapes never change
    worth: float = WORTH  # the share of a shard's tokens for which the reuse of beginnings pays


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A batch of a shard, and where its rows go."""

    shard: Shard
    batch: Batch
    is_last: bool
    buffer: ShardBuffer


def make_shards(
    job: Job, numbers: Iterable[int], write: WriteShard, advance: Callable[[int], None], copies: Copies | None = None
) -> None:
    """Run the model over the shards `numbers` and hand each to `write`, in a thread; return when all are written.

    `advance` hears of each batch's tokens, those of every variant counted. An error of `write` is raised here at the
    next batch. Raises UserError for values that fp16 cannot hold and for a batch that does not fit on the device.
    """
    copies = copies or choose_copies(job.reader.device)
    in_flight: deque[tuple[_Piece, Sent]] = deque()
    with Writer() as writer:

        def land() -> None:
            piece, copy = in_flight.popleft()
            _unload(job.plan, piece, copy)
            if piece.is_last:
                writer.start(partial(_write, write, piece))
            writer.check()
            advance(_n_tokens(piece))

        for piece in _pieces(job, numbers):
            in_flight.append((piece, copies.send(_run_batch(job, piece.shard, piece.batch))))
            while len(in_flight) > copies.depth:
                land()
        while in_flight:
            land()


def _pieces(job: Job, numbers: Iterable[int]) -> Iterator[_Piece]:
    # Shards take turns: a buffer is free when its turn comes, for the writer takes one shard at a time.
    buffers = ShardBuffer(job.plan), ShardBuffer(job.plan)
    for i, number in enumerate(numbers):
        shard = prepare_shard(job.plan, job.windows, job.tokenizer, number)
        batches = batches_of(job, shard)
        for batch in batches:
            yield _Piece(shard=shard, batch=batch, is_last=batch is batches[-1], buffer=buffers[i % 2])


def batches_of(job: Job, shard: Shard) -> list[Batch]:
    """What is run for a shard, batch by batch."""
    window_tokens = job.plan.window_tokens
    worth = job.worth if job.reader.can_continue(window_tokens) else NEVER
    return choose_batches(shard.first, window_tokens, job.batch_windows, worth)


def _n_tokens(piece: _Piece) -> int:
    """The tokens that a batch counts for, those of every variant, whether run or taken from the clean one."""
    shard = piece.shard
    return int((shard.place[piece.batch[0].windows] < shard.n_rows).sum()) * len(shard.inputs)


def _write(write: WriteShard, piece: _Piece) -> None:
    write(piece.shard.number, piece.buffer.finish(piece.shard), piece.shard.columns)


def _run_batch(job: Job, shard: Shard, batch: Batch) -> list[Tensor]:
    """What a batch gives, on the model's device: the largest sizes [calls, hooks], then for each call and hook point
    the stored activations, fp16 [variants, n, window_tokens - start, d_model]."""
    points = [HookPoint.parse(hook.hook_point) for hook in job.plan.hooks]
    peaks, stored = [], []
    try:
        with torch.inference_mode():
            for found in _run_calls(job, shard, batch):
                for point, hook in zip(points, job.plan.hooks, strict=True):
                    low, high = torch.aminmax(found[point])
                    peaks.append(torch.maximum(-low, high).float())
                    # Dividing by a power of two is exact, and has to come before fp16 could overflow.
                    stored.append((found[point] / hook.scale_factor).to(torch.float16))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{job.batch_windows} windows in {len(job.plan.variants)} variants do not fit on {job.reader.device}; "
            "give a smaller --batch-windows"
        ) from error
    return [torch.stack(peaks).reshape(len(batch), len(points)), *stored]


def _run_calls(job: Job, shard: Shard, batch: Batch) -> Iterator[dict[HookPoint, Tensor]]:
    """[variants, n, window_tokens - start, d_model] at each hook point, call by call."""
    first, *others = batch
    if not others:
        yield _shaped(job.reader.read(_tokens(job, shard, first)), first)
        return
    found, kept = job.reader.read_kept(_tokens(job, shard, first))
    yield _shaped(found, first)
    for call in others:
        tokens = _tokens(job, shard, call)
        if call.start:
            assert call.kept is not None
            rows = to_device(torch.from_numpy(call.kept), job.reader.device)
            yield _shaped(job.reader.read_after(kept, rows, call.start, tokens), call)
        else:
            yield _shaped(job.reader.read(tokens), call)


def _tokens(job: Job, shard: Shard, call: Call) -> Tensor:
    """[variants * n, window_tokens - start] on the reader's device."""
    # A call that goes on from another has a shape of its own anyway.
    windows = np.resize(call.windows, job.batch_windows) if job.pad and call.kept is None else call.windows
    inputs = shard.inputs[np.asarray(call.variants)[:, None], windows, call.start :]
    return to_device(torch.from_numpy(inputs.reshape(-1, inputs.shape[2]).astype(np.int64)), job.reader.device)


def _shaped(found: dict[HookPoint, Tensor], call: Call) -> dict[HookPoint, Tensor]:
    """[variants * n, ...] -> [variants, n, ...], without what a short batch was padded with."""
    return {
        point: values.unflatten(0, (len(call.variants), -1))[:, : len(call.windows)] for point, values in found.items()
    }


def _unload(plan: Plan, piece: _Piece, copy: Sent) -> None:
    """Wait until a batch is on the host, look at its largest values, and put its rows where they go."""
    peaks, *arrays = copy.wait()
    _refuse_unstorable(plan, piece.shard.number, peaks)
    for i, values in enumerate(arrays):
        call, hook = piece.batch[i // len(plan.hooks)], i % len(plan.hooks)
        place = piece.shard.place[call.windows, call.start :]
        for variant, part in zip(call.variants, values, strict=True):
            piece.buffer.fill(hook, variant, place, part)


def _refuse_unstorable(plan: Plan, shard: int, peaks: np.ndarray) -> None:
    """`peaks` [calls, hooks] are the largest sizes of the true activations; NaN if any of them is."""
    for hook, peak in zip(plan.hooks, peaks.max(axis=0).tolist(), strict=True):
        if not math.isfinite(peak):
            raise UserError(
                f"{plan.model['id']} gives infinite or NaN activations at {hook.hook_point} in shard {shard}; "
                f"in a new --out, {remedy(plan.model['dtype'])}"
            )
        if peak > FP16_MAX * hook.scale_factor:
            raise UserError(
                f"{hook.hook_point} reaches {peak:,.0f} in shard {shard}, and with the scale factor "
                f"{hook.scale_factor:g} fp16 ends at {FP16_MAX * hook.scale_factor:,.0f}; harvest into a new --out "
                f"with --scale-factor {hook.hook_point}={scale_for(peak):g}"
            )


def writer_threads(device: torch.device, environ: Mapping[str, str]) -> int:
    """Threads for the checksums and moments of a shard: one core makes .4 GB/s of them, and a GPU more activations.

    On a CPU the model has the cores. torchrun's processes on this machine share them.
    """
    if device.type == "cpu":
        return 1
    n_here = environ.get("LOCAL_WORLD_SIZE", "")
    n_processes = int(n_here) if n_here.isdecimal() and int(n_here) else 1
    return min(_MOST_WRITER_THREADS, max(1, (os.cpu_count() or 1) // n_processes // 2))


class Writer:
    """Does one thing at a time in a thread; what goes wrong there is raised in the thread that starts or asks.

    At the end it waits, unless for a KeyboardInterrupt: then the thread dies with the program, as if killed, and what
    it has not committed is made again.
    """

    def __init__(self) -> None:
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for what runs, then begin `work`."""
        self._wait()
        self._running = Future()
        threading.Thread(target=_run, args=(work, self._running), daemon=True, name="shard writer").start()

    def check(self) -> None:
        """Raise what went wrong, if anything has by now."""
        if self._running is not None and self._running.done():
            self._wait()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._wait()
        elif self._running is not None and not issubclass(kind, KeyboardInterrupt):
            self._running.exception()  # the first error is the one to tell


def _run(work: Callable[[], None], outcome: Future[None]) -> None:
    with _Outcome(outcome):
        work()


class _Outcome:
    """Hands whatever ends the work, also an error, to those who wait for the outcome; they raise it."""

    def __init__(self, outcome: Future[None]) -> None:
        self._outcome = outcome

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self._outcome.set_result(None)
        else:
            self._outcome.set_exception(error)
        return True
