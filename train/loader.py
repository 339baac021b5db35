"""Batches from a cache: the rows that the schedule names, read ahead, cast and scaled on the device."""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cache_spec.cache import ActivationCache
from cache_spec.errors import UserError
from cache_spec.layout import ACTIVATION, activation_file
from cache_spec.plan import HookPlan
from cache_spec.progress import Progress
from cache_spec.seeds import derive_seed
from train.columns import RowColumns
from train.config import DataConfig
from train.data_checks import check_options, check_variant, target_hook_of
from train.fetch_ahead import fetch_ahead_of, fetch_and_read_ahead
from train.mixing import BOTH, CLEAN, Mixture, Need, Rows, masking_ranks, need_of
from train.ranks import Team
from train.read_ahead import Made, read_ahead
from train.readers import MAX_FILES, File, Reader, choose_io, open_reader
from train.scale import SamplePart, Scale, measure
from train.schedule import RowSchedule
from train.sharing import Ring, Sharing
from train.spans import READ, span
from train.staging import Memory, Segment, Stage, copy_stream, read_segments
from train.stream import Stream
from train.views import View, segments_of, views_of

MAX_OPEN_SHARDS = 64
SAMPLE_ROWS = 65536  # enough for a mean of squared norms to three digits
_SAMPLE_PART = 1024  # rows in memory at a time
_SAMPLE_THREADS = 8  # where each row has a way to come
_LONG_CHECK = 8 << 30  # bytes that it takes more than a few seconds to check


@dataclass(frozen=True)
class Pieces:
    """The rows of a step: where they lie, how they are masked, and the tensors that they make, one a view."""

    step: int
    shards: Sequence[int]
    inside: Sequence[np.ndarray]
    rank: np.ndarray
    need: Need
    views: Sequence[View]
    row: np.ndarray
    unreplaced: np.ndarray

    def segments(self, view: View) -> Iterator[Segment]:
        """What to read for a view."""
        return segments_of(view, self.shards, self.inside, self.rank)


class MixedBatchLoader:
    """Reads batches from the train shards of a cache.

    Rows of special tokens are left out. With `data.target_hook` each batch also has the rows of a second hook point.
    `io` is how it reads and `io_note` says why. Raises UserError if an option is unknown or the cache has fewer
    usable rows than one batch.
    """

    def __init__(
        self,
        cache: ActivationCache,
        data: DataConfig,
        *,
        with_masked: bool = True,
        device: str = "cpu",
        team: Team | None = None,
    ) -> None:
        check_options(data)
        self.cache, self.data, self.device = cache, data, torch.device(device)
        self.hook = cache.hook(data.hook)
        self.target_hook = target_hook_of(cache, data, self.hook)
        self.d_out = self.target_hook.d_model
        check_variant(cache, data, with_masked)
        self.shards = cache.train_shards
        n_open = self._n_open()
        n_kept = 2 * n_open + 8  # a stretch may stand across two shards
        self._columns = RowColumns(cache, data.masked_variant, data.positions, n_kept)
        counts = self._columns.counts(self.shards)
        self._n_usable = dict(zip(self.shards, counts.tolist(), strict=True))
        self.n_rows = int(counts.sum())
        if self.n_rows < data.batch_size:
            raise UserError(
                f"{cache.place} has {self.n_rows:,} rows to train on, fewer than one batch of {data.batch_size:,}; "
                "lower --batch-size or harvest more tokens"
            )
        self.n_batches = self.n_rows // data.batch_size  # whole ones in the first epoch
        self.n_steps = data.n_tokens // data.batch_size
        self.schedule = RowSchedule(counts, batch_size=data.batch_size, n_open=n_open, seed=data.seed)
        arrays = self._arrays(with_masked)
        self._n_bytes = self._bytes_of(arrays)
        url = cache.place if cache.files.is_remote else ""
        self.io, self.io_note = choose_io(data.io, cache.path, self._n_bytes, url)
        self._reader: Reader = open_reader(self.io, cache, len(arrays) * n_kept)
        self._sharing = Sharing(team) if team is not None and len(team.node) > 1 else None
        self._fetch_ahead = fetch_ahead_of(
            cache,
            self._reader,
            [(hook.name, variant) for hook, variant in arrays],
            self._columns.of,
            n_open=n_open,
            n_files=min(MAX_FILES, len(arrays) * n_kept),
            horizon=2 * cache.plan.shard_rows * n_open // data.batch_size,
        )
        self.scale, self.target_scale = self._scales(with_masked)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batch in the epoch) of a step: all there is to a loader's state."""
        return self.schedule.position(step)

    def read(self, step: int, *, with_masked: bool = True) -> Rows:
        """The rows of one step, on the device, as float32, divided by the norm factor; masked ones too, or clean only.

        This is the plain way, for a few steps: see `stream`.
        """
        stage = Stage(self.data.batch_size, self.device, None, Memory())
        return self._send(stage, self.fill(stage, step, BOTH if with_masked else CLEAN))

    @contextmanager
    def stream(self, first: int, last: int, mixtures: Set[Mixture] = BOTH) -> Iterator[Stream]:
        """The rows of steps `first` to `last - 1`, read ahead by threads, and no more of them than the mixtures take.

        Any of the mixtures gives the same batch as from `read`. Damage that a thread meets is raised where its rows
        are due. At the end of the `with` no thread is left. The ranks of a machine call it together, each with the
        steps and mixtures that it wants, and get rows that one of them reads.
        """
        beside, memory = copy_stream(self.device), Memory()
        stages = [Stage(self.data.batch_size, self.device, beside, memory) for _ in range(self.data.read_ahead)]

        def make(step: int, slot: int) -> tuple[Stage, Rows]:
            stages[slot].wait()
            with span(READ):
                return stages[slot], self._send(stages[slot], self.fill(stages[slot], step, mixtures))

        if self._sharing is not None:
            with self._shared_stream(self._sharing, range(first, last), mixtures, stages) as stream:
                yield stream
            return
        with self._reading_ahead(make, range(first, last), mixtures) as results:
            yield Stream(results)

    @contextmanager
    def _shared_stream(
        self, sharing: Sharing, steps: range, mixtures: Set[Mixture], stages: Sequence[Stage]
    ) -> Iterator[Stream]:
        """The rows of some steps on one of several ranks. The one that reads does so to the end of what any wants."""
        n_wanting = 1  # 0 when this rank itself wants no more rows

        def make(step: int, slot: int) -> tuple[Stage, Rows] | None:
            stages[slot].wait()
            with span(READ):
                filled = self._fill_shared(ring, stages[slot], step, wanted=step in steps and n_wanting > 0)
                return filled and (stages[slot], filled)

        with sharing.ring(steps.start, steps.stop, mixtures, n_slots=len(stages), slot_bytes=self._slot_bytes) as ring:
            wanted = range(ring.wanted.first, ring.wanted.last) if ring.reads else steps
            with self._reading_ahead(make, wanted, ring.wanted.mixtures if ring.reads else None) as results:
                try:
                    yield Stream(made for made in results if made is not None)
                    n_wanting = 0
                    for _ in results if ring.reads else ():
                        pass
                finally:
                    ring.stop_waiting()

    def _fill_shared(self, ring: Ring, stage: Stage, step: int, *, wanted: bool) -> Rows | None:
        """Read the rows of a step for all ranks, if this is the one that reads, and give them, if they are wanted."""
        pieces = self._pieces(step, ring.wanted.mixtures)
        tensors = ring.tensors(step, [(self.data.batch_size, view.hook.d_model) for view in pieces.views])
        if ring.reads:
            with ring.filling(step):
                for view, tensor in zip(pieces.views, tensors, strict=True):
                    read_segments(pieces.segments(view), self._reader, tensor)
        if not wanted:
            return None
        with ring.using(step):
            for which, (view, tensor) in enumerate(zip(pieces.views, tensors, strict=True)):
                stage.take(which, tensor, self._factor(view.hook))
            return self._send(stage, pieces)

    def _slot_bytes(self, mixtures: Set[Mixture]) -> int:
        """The most that a step of these mixtures takes."""
        n_views = 2 if any(each.masked_fraction or each.with_twin for each in mixtures) else 1
        widths = self.hook.d_model + (self.d_out if self.data.target_hook else 0)
        return n_views * self.data.batch_size * widths * ACTIVATION.itemsize

    def _scales(self, with_masked: bool) -> tuple[Scale, Scale]:
        """Of the rows and of their targets, measured by the rank of this machine that reads."""
        if self._sharing is not None and not self._sharing.reads:
            told = self._sharing.agree(None)
            assert isinstance(told, list)
            return Scale(**told[0]), Scale(**told[1])
        scale = target_scale = measure(self._sample(self.hook, with_masked), self._mean_square(self.hook))
        if self.data.target_hook:
            sample = self._sample(self.target_hook, with_masked and self.data.target == "self")
            target_scale = measure(sample, self._mean_square(self.target_hook))
        if self._sharing is not None:
            self._sharing.agree([vars(scale), vars(target_scale)])
        return scale, target_scale

    def _reading_ahead(
        self, make: Callable[[int, int], Made], steps: range, mixtures: Set[Mixture] | None
    ) -> AbstractContextManager[Iterator[Made]]:
        """What is made of steps, ahead; the files of a remote cache come earlier still, where they are read."""
        fetch = self._fetch_ahead if mixtures is not None else None
        files_of = partial(self._files_of, mixtures=mixtures or CLEAN)
        return fetch_and_read_ahead(fetch, make, steps, files_of, self.data, self.device)

    def _files_of(self, step: int, mixtures: Set[Mixture]) -> list[File]:
        """The files that `fill` reads for a step."""
        shards = dict.fromkeys(self.shards[piece.shard] for piece in self.schedule.pieces(step))
        views = views_of(need_of(mixtures, self.data.batch_size, step), self.data, self.hook, self.target_hook)
        parts = [(view.hook.name, variant) for view in views for variant, low, high in view.parts if low < high]
        return [(*part, shard) for shard in shards for part in parts]

    def _arrays(self, with_masked: bool) -> list[tuple[HookPlan, str]]:
        """Hook point and variant of everything that a step reads."""
        variants = ["clean", self.data.masked_variant] if with_masked else ["clean"]
        arrays = [(self.hook, variant) for variant in variants]
        if self.data.target_hook:
            wanted = variants if self.data.target == "self" else ["clean"]
            arrays += [(self.target_hook, variant) for variant in wanted]
        return arrays

    def fill(self, stage: Stage, step: int, mixtures: Set[Mixture]) -> Pieces:
        """Read what the mixtures take of one step's rows."""
        pieces = self._pieces(step, mixtures)
        for which, view in enumerate(pieces.views):
            stage.fill(which, view.hook.d_model, pieces.segments(view), self._reader, self._factor(view.hook))
        return pieces

    def _pieces(self, step: int, mixtures: Set[Mixture]) -> Pieces:
        pieces = self.schedule.pieces(step)
        columns = [self._columns.of(self.shards[piece.shard]) for piece in pieces]
        inside = [own.usable[piece.first : piece.first + piece.n] for own, piece in zip(columns, pieces, strict=True)]
        shards = [self.shards[piece.shard] for piece in pieces]
        row = [rows + np.int64(shard * self.cache.plan.shard_rows) for rows, shard in zip(inside, shards, strict=True)]
        unreplaced = [own.unreplaced[rows] for own, rows in zip(columns, inside, strict=True)]
        need = need_of(mixtures, self.data.batch_size, step)
        return Pieces(
            step=step,
            shards=shards,
            inside=inside,
            rank=masking_ranks([piece.n for piece in pieces], derive_seed("train/mix", self.data.seed, step)),
            need=need,
            views=views_of(need, self.data, self.hook, self.target_hook),
            row=np.concatenate(row),
            unreplaced=np.concatenate(unreplaced),
        )

    def _factor(self, hook: HookPlan) -> float:
        """From stored values to training units."""
        scale = self.scale if hook.name == self.hook.name else self.target_scale
        return hook.scale_factor / scale.norm_factor

    def _send(self, stage: Stage, pieces: Pieces) -> Rows:
        """The rows of a filled stage, on the device."""
        tensors: dict[tuple[str, str], Tensor] = {}
        with stage.sending():
            for which, view in enumerate(pieces.views):
                sent = stage.send(which)
                tensors |= {(view.hook.name, variant): sent for variant, _, _ in view.parts}
            other = self.target_hook.name if self.data.target_hook else ""
            return Rows(
                clean=tensors[self.hook.name, "clean"],
                masked=tensors.get((self.hook.name, self.data.masked_variant)),
                row=pieces.row,
                step=pieces.step,
                rank=torch.from_numpy(pieces.rank).to(self.device),
                need=pieces.need,
                unreplaced=torch.from_numpy(pieces.unreplaced).to(self.device) if pieces.need.masked_to else None,
                target_clean=tensors.get((other, "clean")),
                target_masked=tensors.get((other, self.data.masked_variant)),
            )

    def _mean_square(self, hook: HookPlan) -> float | None:
        """Of all clean rows to train on, without reading them, where the cache has counted just these: its moments
        leave out special tokens, as we do, but not replaced ones. Caches of format 1.0 have none."""
        if self.data.positions != "all" or not self.cache.plan.has_moments:
            return None
        return self.cache.moments(hook.name, "clean", self.shards).mean_square_norm

    def _sample(self, hook: HookPlan, with_masked: bool) -> Iterator[SamplePart]:
        """About 65,536 clean rows and their masked twins; the same ones whatever the seed."""
        share = -(-SAMPLE_ROWS // len(self.shards))
        starts = {shard: range(0, min(share, self._n_usable[shard]), _SAMPLE_PART) for shard in self.shards}

        def part(shard: int, start: int) -> SamplePart:
            inside = self._columns.of(shard).usable[start : min(start + _SAMPLE_PART, share)]
            return SamplePart(
                clean=self._sample_rows(hook, "clean", shard, inside),
                masked=self._sample_rows(hook, self.data.masked_variant, shard, inside) if with_masked else None,
                where=f"{hook.name} in shard {shard} of {self.cache.place}",
            )

        if not self.cache.files.is_remote:
            yield from (part(shard, start) for shard in self._watched(hook) for start in starts[shard])
            return
        places = [(shard, start) for shard in self.shards for start in starts[shard]]
        n_threads = min(_SAMPLE_THREADS, len(places))
        with (
            read_ahead(
                lambda i, _: part(*places[i]), range(len(places)), n_slots=n_threads, n_threads=n_threads
            ) as made,
            Progress(f"a sample of {hook.name}", len(places), "parts") as progress,
        ):
            for each in made:
                yield each
                progress.advance()

    def _sample_rows(self, hook: HookPlan, variant: str, shard: int, inside: np.ndarray) -> Tensor:
        """Rows as they are in the model [n, d_model]."""
        stored = np.empty((len(inside), hook.d_model), np.float16)
        self._reader.read_sample((hook.name, variant, shard), inside, stored)
        return torch.from_numpy(stored).to(self.device).to(torch.float32).mul_(hook.scale_factor)

    def _watched(self, hook: HookPlan) -> Iterator[int]:
        """The train shards, with a progress bar if it takes a while to check their files."""
        if self.io != "mmap" or self._n_bytes < _LONG_CHECK:
            yield from self.shards
            return
        with Progress(f"checking {hook.name}", len(self.shards), "shards") as progress:
            for shard in self.shards:
                yield shard
                progress.advance()

    def _n_open(self) -> int:
        """Open shards: as asked, or enough to hold the windows of two batches' worth of rows."""
        plan = self.cache.plan
        if self.data.open_shards:
            return min(self.data.open_shards, self.data.batch_size)
        wanted = math.ceil(2 * self.data.batch_size * plan.window_tokens / plan.shard_rows)
        return min(max(wanted, 4), MAX_OPEN_SHARDS, self.data.batch_size)

    def _bytes_of(self, arrays: Sequence[tuple[HookPlan, str]]) -> int:
        records = self.cache.records
        return sum(
            records[shard]["files"][activation_file(hook.name, variant, shard)]["bytes"]
            for hook, variant in arrays
            for shard in self.shards
        )
