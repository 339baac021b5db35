"""Rows a second from a warm cache: our loader beside memcpy, memory-mapped data sets and SAELens's cached activations.

    python -m benchmarks.loader [--d-model 2304] [--batch-size 4096] [--masked-fraction 0.5] [--saelens ENVIRONMENT]

All on the same made-up rows, each several times in turn. The ruler is memcpy of the same fp16 bytes by one thread.
`buffers` is what feeds a GPU: the rows of every step, in fp16, in host memory. `float32` is what a CPU trains on: cast
and divided by the norm factor. Ours are mixed, half of them masked; the others read clean rows only, which is less.
"""

import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from torch.utils.data import DataLoader, Dataset

from cache_spec import (
    FLAG_BOS,
    FLAG_VALID,
    ActivationCache,
    HookPlan,
    HookPoint,
    Plan,
    UserError,
    VariantPlan,
    column_types,
    create_cache,
    finalize_cache,
    write_shard,
)
from cache_spec.command import run_command
from cache_spec.layout import activation_file
from train.config import DataConfig
from train.loader import MixedBatchLoader
from train.mixing import Mixture
from train.read_ahead import read_ahead
from train.report import keep_freed_memory
from train.staging import Memory, Stage

WINDOW = 128
SAELENS_BATCHES = 8  # a round: it takes long
SAELENS_BUFFERS = (2, 16)  # batches that it mixes: the least it takes, and what its published runs have
RULER = "memcpy, 1 thread"
Contestant = Callable[[], tuple[int, float]]  # rows and seconds
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def make_cache(path: Path, d_model: int, shard_rows: int, n_shards: int) -> ActivationCache:
    """Random rows in two variants; one row in 128 is a first token."""
    point = HookPoint("resid_post", 1)
    hook = HookPlan(
        name=point.group,
        hook_point=str(point),
        tl_name=point.tl_name,
        hf_name="model.layers.1",
        d_model=d_model,
        scale_factor=1.0,
    )
    masked = VariantPlan(name="masked", kind="mask", mask_prob=0.3, mask_string="...", mask_token=7)
    n_rows = n_shards * shard_rows
    plan = Plan(
        n_rows=n_rows,
        n_train_rows=n_rows,
        shard_rows=shard_rows,
        chunk_rows=1024,
        hooks=(hook,),
        variants=(VariantPlan(name="clean", kind="clean"), masked),
        window_tokens=WINDOW,
        n_train_windows=n_rows // WINDOW,
        n_held_out_windows=0,
        seed=0,
        model={"id": "made-up"},
        tokenizer={"id": "made-up"},
        source={"id": "made-up text"},
    )
    create_cache(path, plan)
    rng = np.random.default_rng(0)
    rows = np.resize(rng.normal(size=(4096, d_model)).astype("<f2"), (shard_rows, d_model))
    for shard in range(n_shards):
        columns = {name: np.zeros(shard_rows, dtype) for name, dtype in column_types(plan).items()}
        columns["flags"][:] = np.where(rng.random(shard_rows) < 1 / WINDOW, FLAG_VALID | FLAG_BOS, FLAG_VALID)
        write_shard(path, plan, shard, {("layer_1", variant.name): rows for variant in plan.variants}, columns)
    finalize_cache(path)
    return ActivationCache.open(path)


def timed(epoch: Callable[[], Iterator[int]]) -> Contestant:
    """Time a whole epoch of batches, of which an iterator says how many rows each had; once to warm up."""

    def contestant() -> tuple[int, float]:
        began = time.perf_counter()
        n_rows = sum(epoch())
        return n_rows, time.perf_counter() - began

    contestant()
    return contestant


def copied(cache: ActivationCache, data: DataConfig, n_threads: int) -> Contestant:
    """The ruler: memcpy of the same fp16 rows from memory into one batch's buffer, a part a thread."""
    source = np.ones((cache.plan.n_rows, cache.plan.hooks[0].d_model), np.float16)
    target = np.ones((data.batch_size, source.shape[1]), np.float16)
    parts = [slice(*np.array([i, i + 1]) * data.batch_size // n_threads) for i in range(n_threads)]

    def epoch() -> Iterator[int]:
        with ThreadPoolExecutor(n_threads) as pool:
            for start in range(0, len(source) - data.batch_size + 1, data.batch_size):
                rows = source[start : start + data.batch_size]
                if n_threads == 1:
                    target[:] = rows
                else:
                    list(pool.map(lambda part, rows=rows: np.copyto(target[part], rows[part]), parts))
                yield data.batch_size

    return timed(epoch)


def buffered(cache: ActivationCache, data: DataConfig, mixture: Mixture) -> Contestant:
    """Our loader as it feeds a GPU, up to the host buffers that the copy would start from."""
    loader = MixedBatchLoader(cache, data)
    stages = [Stage(data.batch_size, loader.device, None, Memory()) for _ in range(data.read_ahead)]

    def epoch() -> Iterator[int]:
        def make(step: int, slot: int) -> int:
            return len(loader.fill(stages[slot], step, {mixture}).row)

        steps = range(loader.n_batches)
        with read_ahead(make, steps, n_slots=len(stages), n_threads=data.readers) as made:
            yield from made

    return timed(epoch)


def streamed(cache: ActivationCache, data: DataConfig, mixtures: set[Mixture]) -> Contestant:
    """Our loader as it trains on a CPU: every mixture's rows in float32."""
    loader = MixedBatchLoader(cache, data)

    def epoch() -> Iterator[int]:
        with loader.stream(0, loader.n_batches, mixtures) as stream:
            for rows in stream:
                for mixture in mixtures:
                    rows.mix(mixture.masked_fraction)
                yield len(rows.row)

    return timed(epoch)


def looped(cache: ActivationCache, data: DataConfig, *, random_rows: bool) -> Contestant:
    """What one writes without a loader: fancy indexing into a memmap a shard at a time, cast and scaled."""
    maps = [cache.activations("layer_1", "clean", shard) for shard in cache.train_shards]
    rng = np.random.default_rng(0)

    def epoch() -> Iterator[int]:
        for rows in maps:
            order = rng.permutation(len(rows)) if random_rows else np.arange(len(rows))
            for start in range(0, len(rows), data.batch_size):
                yield len(torch.from_numpy(rows[order[start : start + data.batch_size]]).to(torch.float32).mul_(0.5))

    return timed(epoch)


class MappedRows(Dataset[torch.Tensor]):
    """Rows of memory-mapped files, one at a time, as a DataLoader asks for them."""

    def __init__(self, maps: Sequence[np.ndarray]) -> None:
        self._maps, self._shard_rows = maps, len(maps[0])

    def __len__(self) -> int:
        return sum(map(len, self._maps))

    def __getitem__(self, i: int) -> torch.Tensor:
        shard, inside = divmod(i, self._shard_rows)
        return torch.from_numpy(self._maps[shard][inside])


def loaded(cache: ActivationCache, data: DataConfig, n_workers: int) -> Contestant:
    """A memmap data set and torch's DataLoader, shuffled."""
    file = [cache.path / activation_file("layer_1", "clean", shard) for shard in cache.train_shards]
    shape = (cache.plan.shard_rows, cache.plan.hooks[0].d_model)
    maps = [np.memmap(path, np.float16, "c", shape=shape) for path in file]
    batches = DataLoader(MappedRows(maps), data.batch_size, shuffle=True, num_workers=n_workers)
    return timed(lambda: (len(batch) for batch in batches))


@contextmanager
def saelens(
    environment: Path, cache: ActivationCache, data: DataConfig, folder: Path, n_mixed: int
) -> Iterator[dict[str, Contestant]]:
    """SAELens's loader of cached activations, mixing so many batches, in a process with its own environment."""
    python = environment / "bin" / "python"
    if not python.exists():
        raise UserError(f"{environment} has no bin/python; give --saelens the folder of a virtual environment")
    d_model = cache.plan.hooks[0].d_model
    with (folder / "rows").open("wb") as file:
        for shard in cache.train_shards:
            cache.activations("layer_1", "clean", shard).tofile(file)
    numbers = map(str, (d_model, WINDOW, data.batch_size, SAELENS_BATCHES, n_mixed))
    script = str(Path(__file__).parent / "saelens_loader.py")
    command = [str(python), script, str(folder / "rows"), *numbers, str(folder / "arrow")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def contestant() -> tuple[int, float]:
            print(file=ask, flush=True)
            answer = answers.readline()
            if not answer:
                raise UserError(f"{python} {script} ended early; run it by itself to see why")
            return SAELENS_BATCHES * data.batch_size, float(answer)

        version = answers.readline().strip()
        if not version:
            raise UserError(f"{python} cannot run SAELens's loader; run {' '.join(command)} to see why")
        yield {f"SAELens {version}, cached, fp16, mixing {n_mixed} batches": contestant}
        ask.close()


@dataclass(frozen=True)
class Table:
    """Rows a second of every contestant, round by round."""

    rates: dict[str, list[float]]
    d_model: int

    def print(self) -> None:
        """Medians, ratios of medians, and the smallest and largest of the rounds."""
        ruler = median(self.rates[RULER])
        print(f"{'':<52}{'rows/s':>12}{'GB/s':>8}{'x memcpy':>10}   rounds")
        for name, measured in self.rates.items():
            rate = median(measured)
            spread = f"{min(measured) / ruler:.3f} to {max(measured) / ruler:.3f}"
            print(f"{name:<52}{rate:>12,.0f}{rate * 2 * self.d_model / 1e9:>8.2f}{rate / ruler:>10.3f}   {spread}")


def make_contestants(cache: ActivationCache, data: DataConfig, masked_fraction: float) -> dict[str, Contestant]:
    """Everything that runs in this process."""
    half, clean = Mixture(masked_fraction), Mixture(0.0)
    found = {RULER: copied(cache, data, 1), "memcpy, 2 threads": copied(cache, data, 2)}
    for io in ("mmap", "pread"):
        found[f"granary, buffers, {io}"] = buffered(cache, replace(data, io=io), half)
    found["granary, float32"] = streamed(cache, data, {half})
    if masked_fraction:
        found[f"granary, float32, mixtures 0 and {masked_fraction:g}"] = streamed(cache, data, {clean, half})
    return found | {
        "np.memmap, rows in order, float32": looped(cache, data, random_rows=False),
        "np.memmap, random rows, float32": looped(cache, data, random_rows=True),
        "memmap DataLoader, shuffled, fp16": loaded(cache, data, 0),
        "memmap DataLoader, shuffled, fp16, 2 workers": loaded(cache, data, 2),
    }


@app.command()
def main(
    d_model: Annotated[int, typer.Option(help="Width of the made-up rows.", min=1)] = 2304,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.", min=1)] = 4096,
    masked_fraction: Annotated[float, typer.Option(help="Masked share of our batches.", min=0, max=1)] = 0.5,
    rows: Annotated[int, typer.Option(help="Rows of each variant; rounded down to whole shards.", min=1024)] = 131072,
    shard_rows: Annotated[int, typer.Option(help="Rows in a shard, a multiple of 1024.", min=1024)] = 65536,
    readers: Annotated[int, typer.Option(help="Threads that read ahead, as --readers of train.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="Times that each is measured.", min=1)] = 5,
    saelens_at: Annotated[
        Path | None,
        typer.Option("--saelens", help="Folder of a virtual environment with sae-lens; else it is left out."),
    ] = None,
) -> None:
    """Make a cache in a temporary folder and print the table."""
    keep_freed_memory()  # as training does
    data = DataConfig(hook="layer_1", n_tokens=batch_size, batch_size=batch_size, readers=readers)
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder) / "cache", d_model, shard_rows, max(1, rows // shard_rows))
        contestants = make_contestants(cache, data, masked_fraction)
        with ExitStack() as stack:
            if saelens_at is None:
                print("SAELens is left out; name an environment that has it with --saelens")
            else:
                for n_mixed in SAELENS_BUFFERS:
                    contestants |= stack.enter_context(saelens(saelens_at, cache, data, Path(folder), n_mixed))
            table = measure(contestants, rounds, d_model)
    print(f"{cache.plan.n_rows:,} rows of {d_model}, batch {batch_size}, masked {masked_fraction:g}, {readers} readers")
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}")
    table.print()


def measure(contestants: dict[str, Contestant], rounds: int, d_model: int) -> Table:
    """Every contestant once a round, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            n_rows, seconds = contestant()
            rates[name].append(n_rows / seconds)
    return Table(rates, d_model)


def processor() -> str:
    """What Linux calls the processor, elsewhere what Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    run_command(app)
