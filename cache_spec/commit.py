"""Writing one shard: all of its files, then the record that says it is whole."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.errors import CacheError
from cache_spec.files import (
    Partial,
    crc32c,
    disk_full_as_error,
    exclusive,
    readable_json,
    seal,
    sync_folder,
    write_new_file,
)
from cache_spec.layout import (
    ACTIVATION,
    CHECKSUM_BYTES,
    FP16_MAX,
    LOCK,
    MOMENT,
    MOMENTS,
    activation_file_bytes,
    activation_files,
    checksum_bytes,
    column_file,
    column_fill,
    column_types,
    moment_file,
    plain_index,
    record_file,
    shard_files,
)
from cache_spec.moments import Moments, merge, moments_of_block, ordinary_rows
from cache_spec.plan import HookPlan, Plan
from cache_spec.state import read_record

_GO_ON = "run the same command again, it goes on from the last finished shard"
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""What `map` does, in the order of its input."""
_INFINITE_BITS = 0x7C00  # fp16 without its sign: this and above are inf and NaN


def write_shard(
    path: str | Path,
    plan: Plan,
    shard: int,
    activations: Mapping[tuple[str, str], np.ndarray],
    columns: Mapping[str, np.ndarray],
    *,
    n_threads: int = 1,
) -> dict[str, Any]:
    """Write one shard of the cache at `path` and commit it; returns its record.

    `activations` maps (hook name, variant name) to fp16 [rows, d_model], already divided by the scale factor;
    `columns` maps each column to [rows] of its exact type. A killed writer leaves nothing that looks whole.
    If another writer has committed the shard, this copy is discarded and the other's record returned. The bytes do not
    depend on `n_threads`, among which the checksums, the moments and the waiting for the disk are divided.

    Raises CacheError for wrong arrays and for values that are not finite, DiskFull if the disk fills up.
    """
    root = Path(path)
    _check_arrays(plan, shard, activations, columns)
    if (committed := read_record(root, plan, shard)) is not None:
        return committed
    ordinary = ordinary_rows(columns["flags"])
    needed = sum(shard_files(plan, shard).values())
    with disk_full_as_error(root, needed, _GO_ON), ExitStack() as stack:
        in_order = _in_order(n_threads, stack)
        writer = ShardWriter(root, stack)
        for file, (hook, variant) in activation_files(plan, shard).items():
            rows = activations[hook.name, variant.name]
            chunks = in_order(partial(_Chunk.of, plan, rows, ordinary), range(0, len(rows), plan.chunk_rows))
            writer.files[file], moments = _write_activations(writer.open(file), plan, hook, shard, chunks)
            if plan.has_moments:
                for moment, values in zip(MOMENTS, (moments.mean, moments.m2), strict=True):
                    writer.write_array(moment_file(hook.name, variant.name, moment, shard), values.astype(MOMENT))
        for name, dtype in column_types(plan).items():
            padded = np.full(plan.shard_rows, column_fill(dtype), dtype)
            padded[: len(columns[name])] = columns[name]
            writer.write_array(column_file(name, shard), padded)
        record = {"spec_version": plan.spec_version, "cache_id": plan.cache_id, "shard": shard}
        record |= {"rows": plan.rows_in(shard)}
        record |= {"moment_rows": int(ordinary.sum())} if plan.has_moments else {}
        return writer.commit(plan, {**record, "files": writer.files}, in_order)


class ShardWriter:
    """The files of one shard, each under a temporary name until all of them are whole and are committed together."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self._root, self._stack = root, stack
        self._partials: list[Partial] = []
        self.files: dict[str, Any] = {}  # what the record says of each

    def open(self, file: str) -> Partial:
        """Begin a file; what is not committed vanishes with the stack."""
        self._partials.append(self._stack.enter_context(Partial(self._root / file)))
        return self._partials[-1]

    def write_array(self, file: str, values: np.ndarray) -> None:
        """A file of one chunk: the values, then their CRC."""
        partial, checksum = self.open(file), crc32c(values)
        partial.write(values)
        partial.write(checksum_bytes(checksum))
        self.files[file] = {"bytes": values.nbytes + CHECKSUM_BYTES, "crc32c": [f"{checksum:08x}"]}

    def commit(self, plan: Plan, record: dict[str, Any], in_order: "InOrder" = map) -> dict[str, Any]:
        """Name the files and link the record, alone: no file may be replaced once a record vouches for it.

        Returns the record that the shard has then, which is another's if it came first.
        """
        for _ in in_order(Partial.sync, self._partials):
            pass
        with exclusive(self._root / LOCK):
            if (committed := read_record(self._root, plan, record["shard"])) is not None:
                return committed
            for partial in self._partials:
                partial.replace()
            for folder in _new_folders(self._partials):
                sync_folder(folder)
            written = write_new_file(self._root / record_file(record["shard"]), readable_json(seal(record)))
            assert written, "the record appeared while the lock was held"
        return record


def _new_folders(partials: list[Partial]) -> list[Path]:
    """The folders of the files, then those above that the first shard makes (`c/<s>`, `c`, the array)."""
    folders = {partial.final.parent for partial in partials}
    above = {folder.parent for folder in folders}
    return [*sorted(folders), *sorted(above - folders), *sorted({f.parent for f in above} - above - folders)]


def _in_order(n_threads: int, stack: ExitStack) -> InOrder:
    """`map`, or one that works ahead on threads until the stack closes; numpy and the checksum let go of the GIL."""
    if n_threads == 1:
        return map
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="shard")
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool.map


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """An inner chunk [chunk_rows, d_model] as it is written, and what the record and the moments need of it."""

    block: np.ndarray
    checksum: int
    n_nonfinite: int
    absmax: float
    sum_squares: float
    moments: Moments | None

    @classmethod
    def of(cls, plan: Plan, rows: np.ndarray, ordinary: np.ndarray, start: int) -> "_Chunk":
        """The one that begins at row `start` of a shard's rows [rows, d_model]."""
        chosen = slice(start, start + plan.chunk_rows)
        block = np.ascontiguousarray(rows[chosen])
        size = block.view("<u2") & 0x7FFF  # orders like the absolute value, and integers are faster than fp16
        largest = size.max()
        moments = moments_of_block(block, ordinary[chosen]) if plan.has_moments and largest < _INFINITE_BITS else None
        short = plan.chunk_rows - len(block)
        if short:  # an inner chunk has one size; NaN is what no reader takes for data
            block = np.concatenate([block, np.full((short, block.shape[1]), np.nan, ACTIVATION)])
        return cls(
            block=block,
            checksum=crc32c(block),
            n_nonfinite=int(np.count_nonzero(size >= _INFINITE_BITS)) if largest >= _INFINITE_BITS else 0,
            absmax=float(largest.view(ACTIVATION)),
            sum_squares=_sum_squares(size.ravel()),
            moments=moments,
        )


def _write_activations(
    partial: Partial, plan: Plan, hook: HookPlan, shard: int, chunks: Iterable[_Chunk]
) -> tuple[dict[str, Any], Moments]:
    """Stream [rows, d_model] by inner chunks, then the index; returns what the record says of the file, and moments."""
    sums, n_nonfinite, absmax, sum_squares, parts = [], 0, 0.0, 0.0, []
    for chunk in chunks:
        partial.write(chunk.block)
        sums.append(f"{chunk.checksum:08x}")
        n_nonfinite, absmax = n_nonfinite + chunk.n_nonfinite, max(absmax, chunk.absmax)
        sum_squares += chunk.sum_squares
        parts += [chunk.moments] if chunk.moments is not None else []
    if n_nonfinite:
        raise CacheError(
            f"{n_nonfinite:,} values of {partial.final.parent.parent.parent} in shard {shard} are infinite or NaN, and "
            f"fp16 ends at {FP16_MAX:,.0f}; harvest into a new cache with a scale factor above {hook.scale_factor:g}"
        )
    partial.write(plain_index(plan, hook, shard))
    n_bytes = activation_file_bytes(plan, hook, shard)
    facts = {"bytes": n_bytes, "crc32c": sums, "absmax": absmax, "n_nonfinite": 0, "sum_squares": sum_squares}
    return facts, merge(parts, hook.d_model)


def _sum_squares(size: np.ndarray) -> float:
    """Of fp16 values given as bits without sign. Shifting the bits into float32 is eight times faster than astype."""
    total = 0.0
    for start in range(0, len(size), 2**16):  # stays in the cache of the core
        values = (size[start : start + 2**16].astype("<u4") << 13).view("<f4") * np.float32(2.0**112)
        total += float(np.dot(values, values))
    return total


def _check_arrays(
    plan: Plan, shard: int, activations: Mapping[tuple[str, str], np.ndarray], columns: Mapping[str, np.ndarray]
) -> None:
    if not 0 <= shard < plan.n_shards:
        raise CacheError(f"there is no shard {shard}; the plan has {plan.n_shards}")
    n_rows = plan.rows_in(shard)
    wanted: dict[Any, tuple[tuple[int, ...], np.dtype]] = {
        (hook.name, variant.name): ((n_rows, hook.d_model), ACTIVATION)
        for hook in plan.hooks
        for variant in plan.variants
    }
    wanted |= {name: ((n_rows,), dtype) for name, dtype in column_types(plan).items()}
    given: dict[Any, np.ndarray] = {**activations, **columns}
    if set(given) != set(wanted):
        unknown, missing = sorted(map(str, set(given) - set(wanted))), sorted(map(str, set(wanted) - set(given)))
        raise CacheError(f"shard {shard} has arrays the plan lacks: {unknown}, and lacks arrays it has: {missing}")
    for name, (shape, dtype) in wanted.items():
        if given[name].shape != shape or given[name].dtype != dtype:
            raise CacheError(
                f"{name} of shard {shard} is {given[name].dtype} {given[name].shape}; the plan wants {dtype} {shape}"
            )
