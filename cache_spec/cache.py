"""Reading a cache: open it, check that it is whole, hand out arrays. Nothing is decoded or copied on the way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cache_spec.errors import CacheDamaged, CacheError, CacheIncomplete, UserError
from cache_spec.files import crc32c
from cache_spec.folder import Files, Folder
from cache_spec.hook_point import HookPoint
from cache_spec.layout import (
    ACTIVATION,
    COMPLETE,
    HARVESTING,
    MOMENT,
    MOMENTS,
    activation_file,
    archive_level,
    chunk_bytes,
    column_file,
    column_types,
    moment_file,
    record_file,
)
from cache_spec.moments import Moments, merge
from cache_spec.plan import HookPlan, Plan, VariantPlan
from cache_spec.state import check_documents, check_planner_files, read_document, read_plan, read_records, read_root
from cache_spec.verify import activation_fault


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationCache:
    """An opened cache. `shards` are those committed when it was opened; the files of each had their right sizes."""

    path: Path
    """Its folder, or the one of its local copies."""
    files: Files = field(repr=False)
    plan: Plan
    status: str
    shards: tuple[int, ...]
    attributes: Mapping[str, Any] = field(repr=False)
    records: Mapping[int, Mapping[str, Any]] = field(repr=False)
    check: bool = True  # compare an activation file with its checksums when it is first used
    _checked: set[str] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def open(cls, path: str | Path, *, allow_partial: bool = False, check: bool = True) -> "ActivationCache":
        """Open the cache at `path`; with `allow_partial` also one that misses shards.

        Checks the plan, every commit record and the size of every file. The contents of a file are compared with its
        checksums when it is first used, unless `check` is off; `verify_cache` compares them all at once.
        Raises CacheNotFound, CacheIncomplete, CacheDamaged or CacheTooNew.
        """
        root = Path(path)
        plan = read_plan(root)
        attributes = read_root(root)
        records = read_records(root, plan)
        check_documents(lambda file: read_document(root, file), str(root), plan, attributes, records)
        check_planner_files(root, plan)
        return cls.of(root, Folder(root), plan, attributes, records, allow_partial=allow_partial, check=check)

    @classmethod
    def of(
        cls,
        path: Path,
        files: Files,
        plan: Plan,
        attributes: Mapping[str, Any],
        records: Mapping[int, Mapping[str, Any]],
        *,
        allow_partial: bool,
        check: bool,
    ) -> "ActivationCache":
        """A cache of these facts, wherever they were read. Raises CacheDamaged and CacheIncomplete as `open` does."""
        place, status = files.place, attributes["status"]
        if attributes["cache_id"] != plan.cache_id:
            raise CacheDamaged(f"{place}/zarr.json belongs to cache {attributes['cache_id']}, not {plan.cache_id}")
        if status == COMPLETE and len(records) < plan.n_shards:
            lost = next(shard for shard in range(plan.n_shards) if shard not in records)
            raise CacheDamaged(
                f"{place} was complete and has lost {record_file(lost)}; run the same harvest to make the shard again"
            )
        if status != COMPLETE and not allow_partial:
            raise CacheIncomplete(_incomplete(place, status, len(records), plan.n_shards))
        return cls(
            path=path,
            files=files,
            plan=plan,
            status=status,
            shards=tuple(records),
            attributes=attributes,
            records=records,
            check=check,
        )

    @property
    def place(self) -> str:
        """What to call it: its folder or URL."""
        return self.files.place

    @property
    def train_shards(self) -> tuple[int, ...]:
        """The committed shards whose rows are for training."""
        return tuple(shard for shard in self.shards if self.plan.split_of(shard) == "train")

    @property
    def held_out_shards(self) -> tuple[int, ...]:
        """The committed shards whose rows come from documents never trained on."""
        return tuple(shard for shard in self.shards if self.plan.split_of(shard) == "held_out")

    @property
    def is_archive(self) -> bool:
        """Whether its activations are compressed, so that they cannot be mapped."""
        return archive_level(dict(self.attributes)) > 0

    def rows_in(self, shard: int) -> int:
        """Rows of one shard."""
        return self.plan.rows_in(shard)

    def hook(self, text: str) -> HookPlan:
        """The hook point written in any spelling `HookPoint.parse` knows; CacheError lists what the cache holds."""
        try:
            name = HookPoint.parse(text).group
        except UserError as error:
            raise CacheError(f"{error}; {self.place} holds {self._hook_names()}") from None
        for hook in self.plan.hooks:
            if hook.name == name:
                return hook
        raise CacheError(f"{self.place} holds {self._hook_names()}, not {text}; harvest another cache with it")

    def _hook_names(self) -> str:
        return ", ".join(hook.name for hook in self.plan.hooks)

    def variant(self, name: str) -> VariantPlan:
        """The variant of that name; CacheError lists what the cache holds."""
        for variant in self.plan.variants:
            if variant.name == name:
                return variant
        raise CacheError(f"{self.place} holds the variants {', '.join(v.name for v in self.plan.variants)}, not {name}")

    def activations(self, hook_name: str, variant: str, shard: int) -> np.memmap:
        """One shard as it lies on the disk: fp16 [rows, d_model], read-only; true value = stored x scale_factor.

        The first use of a file by this object reads all of it, at gigabytes a second, and compares it with the
        recorded checksums; that also brings it into the system's page cache. Later uses, and all uses of a cache
        opened with `check=False`, only map it. Raises CacheDamaged for a file that was changed.
        """
        with self.open_activations(hook_name, variant, shard) as opened:
            shape = (self.plan.rows_in(shard), self.hook(hook_name).d_model)
            return np.memmap(opened, dtype=ACTIVATION, mode="r", shape=shape)

    def open_activations(self, hook_name: str, variant: str, shard: int) -> BinaryIO:
        """The file that `activations` maps, checked as it says; it starts with the rows, one after the other."""
        hook = self.hook(hook_name)
        file = activation_file(hook.name, self.variant(variant).name, self._committed(shard))
        self._refuse_archive()
        sums = self.records[shard]["files"][file]["crc32c"]
        return self._opened(file, shard, lambda: activation_fault(self.path / file, self.plan, hook, shard, sums))

    def chunk(self, hook_name: str, variant: str, shard: int, number: int) -> np.ndarray:
        """An inner chunk of a shard [chunk_rows, d_model] without the rest of the file, checked like `activations`."""
        hook = self.hook(hook_name)
        file = activation_file(hook.name, self.variant(variant).name, self._committed(shard))
        self._refuse_archive()
        n_bytes = chunk_bytes(self.plan, hook)
        while True:
            with self._missing_as_damage(file, shard):
                data = self.files.read(file, number * n_bytes, n_bytes)
            whole = len(data) == n_bytes
            if whole and self.check:
                whole = f"{crc32c(data):08x}" == self.records[shard]["files"][file]["crc32c"][number]
            if whole:
                return np.frombuffer(data, ACTIVATION).reshape(self.plan.chunk_rows, hook.d_model)
            if not self.files.renew(file):
                first = shard * self.plan.shard_rows + number * self.plan.chunk_rows
                last = first + self.plan.chunk_rows - 1
                raise self._damaged(file, f"fails its checksum in rows {first} to {last}", shard)

    def column(self, name: str, shard: int) -> np.ndarray:
        """One shard of a column [rows]. Raises CacheDamaged if its checksum is not the recorded one."""
        types = column_types(self.plan)
        if name not in types:
            raise CacheError(f"{self.place} holds the columns {', '.join(types)}, not {name}")
        file = column_file(name, self._committed(shard))
        return self._values(file, types[name], self.plan.shard_rows, shard)[: self.plan.rows_in(shard)]

    def moments(self, hook_name: str, variant: str, shards: Sequence[int] | None = None) -> Moments:
        """Mean and m2 of the ordinary rows (no BOS, other special token or padding), as they are in the model.

        Of all committed shards, or of those given; no activation is read. Raises CacheError for a cache of format
        1.0, which has none, and CacheDamaged for a file that was changed.
        """
        hook, name = self.hook(hook_name), self.variant(variant).name
        if not self.plan.has_moments:
            raise CacheError(f"{self.place} is of format 1.0, which has no moments; harvest it again")
        chosen = self.shards if shards is None else shards
        files = {
            (shard, moment): moment_file(hook.name, name, moment, self._committed(shard))
            for shard in chosen
            for moment in MOMENTS
        }
        self.files.gather(list(files.values()))
        parts = []
        for shard in chosen:
            mean, m2 = (self._values(files[shard, moment], MOMENT, hook.d_model, shard) for moment in MOMENTS)
            parts.append(Moments(n=self.records[shard]["moment_rows"], mean=mean, m2=m2))
        stored = merge(parts, hook.d_model)
        scale = hook.scale_factor
        return Moments(n=stored.n, mean=stored.mean * scale, m2=stored.m2 * scale**2)

    def read(self, hook_name: str, variant: str, rows: np.ndarray) -> np.ndarray:
        """Copy global rows, in any order and with repeats: [n] -> fp16 [n, d_model]."""
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise CacheError(f"rows must be a list of whole numbers, not {rows.dtype} {rows.shape}")
        rows = rows.astype(np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.plan.n_rows):
            raise CacheError(f"rows go from 0 to {self.plan.n_rows - 1}, not {rows.min()} to {rows.max()}")
        shards, inside = np.divmod(rows, self.plan.shard_rows)
        out = np.empty((len(rows), self.hook(hook_name).d_model), ACTIVATION)
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            out[chosen] = self.activations(hook_name, variant, shard)[inside[chosen]]
        return out

    def _refuse_archive(self) -> None:
        if self.is_archive:
            raise CacheError(
                f"{self.place} is a compressed archive; make a cache to work with of it: "
                f"`python -m cache_spec transcode {self.place} NEW_FOLDER`"
            )

    def _values(self, file: str, dtype: np.dtype, n: int, shard: int) -> np.ndarray:
        """The n values of a file of one chunk, compared with its checksum."""
        while True:
            with self._missing_as_damage(file, shard), self.files.open(file) as opened:
                values = np.fromfile(opened, dtype, count=n)
            if [f"{crc32c(values):08x}"] == self.records[shard]["files"][file]["crc32c"]:
                return values
            if not self.files.renew(file):
                raise self._damaged(file, "does not match its recorded checksum", shard)

    def _opened(self, file: str, shard: int, fault: Callable[[], str]) -> BinaryIO:
        """A file that was looked at once; while it is open nobody takes it away."""
        while True:
            with self._missing_as_damage(file, shard):
                opened = self.files.open(file)
            what = fault() if self.check and file not in self._checked else ""
            if not what:
                self._checked.add(file)  # two threads at once check twice, which is harmless
                return opened
            opened.close()
            if not self.files.renew(file):
                raise self._damaged(file, what, shard)

    @contextmanager
    def _missing_as_damage(self, file: str, shard: int) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._damaged(file, "is missing", shard) from None

    def _damaged(self, file: str, what: str, shard: int) -> CacheDamaged:
        return CacheDamaged(f"{self.place}/{file} {what}; {self._remedy(shard)}")

    def _remedy(self, shard: int) -> str:
        return f"delete {self.place}/{record_file(shard)} and run the same harvest to make the shard again"

    def _committed(self, shard: int) -> int:
        if shard not in self.records:
            raise CacheError(f"{self.place} has no shard {shard}; {len(self.shards)} of {self.plan.n_shards} are there")
        return shard


def _incomplete(place: str, status: str, n_there: int, n_shards: int) -> str:
    why = "is not finished" if status == HARVESTING else "was closed early"
    return (
        f"{place} {why}: {n_there} of {n_shards} shards are there; run the same harvest again to finish it "
        "(or open it with allow_partial to read what is there)"
    )
