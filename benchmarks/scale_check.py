"""The model of `benchmarks.scale_model` beside this machine: a size of each thing calibrates, others are predicted."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from transformers import GPTNeoXConfig

from benchmarks.harvest import Shape, bare_seconds, make_tokenizer, quiet, save_model, write_text
from benchmarks.jobs import machine, make_job
from benchmarks.loader import make_cache
from benchmarks.model import Rates, floor_seconds
from benchmarks.peers.granary import build
from benchmarks.peers.job import Job, made_up_batches
from benchmarks.scale_model import Machines, harvest_bill, sweep_bill, transformer
from cache_spec.errors import UserError
from cache_spec.seeds import derive_seed
from harvest.model import LoadedModel, load_model
from harvest.options import Options
from harvest.planning import make_plan
from harvest.reader import open_reader
from harvest.request import make_request

ROOT = Path(__file__).parent.parent
WINDOW, KERNEL = 128, "sparse"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Models (d_model, layers) and steps (d_model,d_sae,k,batch); the first of each calibrates."""

    models: tuple[tuple[int, int], ...] = ((256, 2), (256, 4), (512, 4))
    steps: tuple[str, ...] = ("256,2048,32,1024", "256,4096,32,1024", "512,4096,32,1024", "512,4096,32,2048")
    n_windows: int = 32
    product: int = 1024
    copied: int = 2**26
    sweep_steps: tuple[int, int] = (40, 120)


TOY = Sizes(
    models=((16, 1), (16, 2)),
    steps=("16,64,4,32", "16,128,4,32"),
    n_windows=2,
    product=64,
    copied=2**16,
    sweep_steps=(20, 40),
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that was predicted and measured, in seconds; what calibrated is right by itself."""

    what: str
    predicted: float
    measured: float
    calibrates: bool = False


def in_turn(things: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """The median of what each returns, one after another, round by round; a first round warms up."""
    found = [[thing() for thing in things] for _ in range(rounds + 1)][1:]
    return [median(column) for column in zip(*found, strict=True)]


def seconds_of(work: Callable[[], object]) -> float:
    """Wall clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_rates(sizes: Sizes, rounds: int) -> Rates:
    """Bare products in fp32 and memory copied, on one thread."""
    n = sizes.product
    a, b, out = (torch.ones(n, n) for _ in range(3))
    source, target = (torch.ones(sizes.copied // 4) for _ in range(2))
    product, copy = in_turn(
        [lambda: seconds_of(lambda: torch.mm(a, b, out=out)), lambda: seconds_of(lambda: target.copy_(source))],
        3 * rounds,
    )
    return Rates(2.0 * n**3 / product, 2.0 * sizes.copied / copy)


def this_machine(rates: Rates, disk: float, gpus: int = 1) -> Machines:
    """One process is a `GPU` here, and its links are the machine's disk."""
    return Machines(
        gpus=gpus,
        rates=rates,
        gpu_bytes=0.0,
        model_share=1.0,
        step_share=1.0,
        dense_share=1.0,
        disk=disk,
        store=disk,
        near=rates.bytes,
        far=rates.bytes,
        plan_rate=float("inf"),
        price=0.0,
    )


def disk_rate(folder: Path, n_bytes: int) -> float:
    """Bytes a second into a file that is on the disk when the clock stops."""
    data = os.urandom(min(n_bytes, 2**20))

    def write() -> None:
        with open(folder / "rate", "wb") as file:
            for _ in range(max(1, n_bytes // len(data))):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return n_bytes / seconds_of(write)


def predicted(what: Sequence[str], bare: Sequence[float], measured: Sequence[float]) -> tuple[list[Line], float]:
    """Seconds at the bare rates, corrected by the share of them that the first one keeps."""
    share = bare[0] / measured[0]
    lines = [
        Line(what=name, predicted=seconds / share, measured=found, calibrates=i == 0)
        for i, (name, seconds, found) in enumerate(zip(what, bare, measured, strict=True))
    ]
    return lines, share


def check_models(folder: Path, sizes: Sizes, rates: Rates, rounds: int) -> tuple[list[Line], float]:
    """The forward of models that differ in depth and width."""
    names, bare, timed = [], [], []
    for d_model, n_layers in sizes.models:
        loaded = random_model(folder / f"model_{d_model}_{n_layers}", d_model, n_layers)
        request = make_request(loaded, loaded.name, asked(folder, n_layers, "64k"))
        generator = torch.Generator().manual_seed(derive_seed("benchmarks/scale", d_model))
        tokens = torch.randint(4, 2000, (sizes.n_windows, WINDOW), generator=generator)
        with open_reader(loaded, request.hook_points) as reader:
            timed += in_turn([lambda reader=reader, tokens=tokens: bare_seconds(reader, [tokens])], rounds)
        operations = transformer(d_model, n_layers, 4 * d_model, WINDOW).operations
        names.append(f"forward of {n_layers} layers, d {d_model}, {tokens.numel():,} tokens")
        bare.append(tokens.numel() * operations / rates.operations)
    return predicted(names, bare, timed)


def check_steps(sizes: Sizes, rates: Rates, rounds: int) -> tuple[list[Line], float]:
    """Training steps that differ in every size, timed in turn."""
    jobs = [replace(make_job("batchtopk", shape, "fp32", "cpu"), variant=KERNEL) for shape in sizes.steps]
    timed = in_turn([stepper(job) for job in jobs], rounds)
    names = [f"step of d {job.d_model}, d_sae {job.d_sae}, k {job.k}, batch {job.batch}" for job in jobs]
    return predicted(names, [floor_seconds(job, KERNEL, rates) for job in jobs], timed)


def stepper(job: Job) -> Callable[[], float]:
    """Times one step after another of one run."""
    batches = made_up_batches(job)
    contestant = build(job, batches[0])
    turn = iter(range(10**9))
    return lambda: seconds_of(lambda: contestant.step(batches[next(turn) % len(batches)]))


def check_planning(folder: Path, loaded: LoadedModel, n_layers: int, n_tokens: int, rounds: int) -> list[Line]:
    """Reading and cutting texts: it takes a start, and then so long a token, both from the two shorter of three."""
    sizes = [n_tokens, 4 * n_tokens, 16 * n_tokens]
    write_text(folder / "long.txt", sizes[-1])
    requests = [make_request(loaded, loaded.name, asked(folder, n_layers, str(n), "long.txt")) for n in sizes]
    with open_reader(loaded, requests[0].hook_points) as reader, quiet():
        found = in_turn(
            [lambda r=request: seconds_of(lambda: make_plan(loaded, reader, r)) for request in requests], rounds
        )
    rate = (found[1] - found[0]) / (sizes[1] - sizes[0])
    line = [found[0] + rate * (n - sizes[0]) for n in sizes]
    return [
        Line(what=f"planning {n:,} tokens", predicted=seconds, measured=measured, calibrates=i < 2)
        for i, (n, seconds, measured) in enumerate(zip(sizes, line, found, strict=True))
    ]


def check_harvest(folder: Path, size: tuple[int, int], n_tokens: int, machines: Machines, rounds: int) -> list[Line]:
    """Whole harvests into new folders, by one process and by two that claim shards."""
    d_model, n_layers = size
    model = transformer(d_model, n_layers, 4 * d_model, WINDOW)
    model_folder = folder / f"model_{d_model}_{n_layers}"

    def harvest(n: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            options = ("--dataset", str(folder / "text.txt"), "--layers", str(n_layers - 1), "--context", str(WINDOW))
            options = (*options, "--tokens", str(n_tokens), "--out", f"{out}/cache", "--shard", "claim")
            processes = [start("harvest", "--model", str(model_folder), *options) for _ in range(n)]
            said = [output(process) for process in processes]
        return max(float(seconds) for text in said for seconds in re.findall(r" in ([\d.,]+) s \(", text))

    timed = [median([harvest(n) for _ in range(rounds)]) for n in (1, 2)]
    bills = [harvest_bill(model, n_tokens, 2, replace(machines, gpus=n)) for n in (1, 2)]
    names = [f"harvest of {n_tokens:,} rows in 2 variants, {n} process{'es' if n > 1 else ''}" for n in (1, 2)]
    lines = [(name, bill.seconds, found) for name, bill, found in zip(names, bills, timed, strict=True)]
    return [Line(what=name, predicted=seconds, measured=found) for name, seconds, found in lines]


def check_sweep(folder: Path, sizes: Sizes, machines: Machines, rounds: int) -> list[Line]:
    """Four SAEs by one process and by two, each whole in one: a long run less a short one, so without the start."""
    job = replace(make_job("batchtopk", sizes.steps[0], "fp32", "cpu"), variant=KERNEL)
    cache = make_cache(folder / "cache", job.d_model, 1024 * 8, 4)
    few, many = sizes.sweep_steps

    def train(n: int, steps: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            options = ("--arch", job.arch, "--d-sae", str(job.d_sae), "--k", str(job.k), "--seed", "0,1,2,3")
            options = (*options, "--batch-size", str(job.batch), "--tokens", str(steps * job.batch), "--kernel", KERNEL)
            launch = ("torch.distributed.run", f"--nproc-per-node={n}", "-m", "train") if n > 1 else ("train",)
            words = (*launch, "--cache", str(cache.path), "--out", f"{out}/runs", *options, "--device", "cpu")
            return seconds_of(lambda: output(start(*words)))

    lines = []
    for n in (1, 2):
        found = median([train(n, many) - train(n, few) for _ in range(rounds)])
        bill = sweep_bill(job, 4, (many - few) * job.batch, 1, KERNEL, replace(machines, gpus=n))
        name = f"{many - few} steps of 4 SAEs, {n} process{'es' if n > 1 else ''}"
        lines.append(Line(what=name, predicted=bill.seconds, measured=found))
    return lines


def start(*words: str) -> "subprocess.Popen[str]":
    """One of our commands, on one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process: "subprocess.Popen[str]") -> str:
    """What it prints. Raises UserError with its last words if it fails."""
    said, _ = process.communicate()
    if process.returncode:
        raise UserError(f"a command ended with code {process.returncode}: {said.strip()[-300:]}")
    return said


def random_model(folder: Path, d_model: int, n_layers: int) -> LoadedModel:
    """A GPT-NeoX that nobody trained, made once."""
    if not folder.exists():
        tokenizer = make_tokenizer()
        config = GPTNeoXConfig(
            hidden_size=d_model,
            num_hidden_layers=n_layers,
            num_attention_heads=max(1, d_model // 64),
            intermediate_size=4 * d_model,
            max_position_embeddings=2 * WINDOW,
            vocab_size=len(tokenizer),
        )
        with quiet():
            save_model(Shape(config=config, dtype="float32", layer=0, window_tokens=WINDOW), tokenizer, folder)
    return load_model(str(folder))


def asked(folder: Path, n_layers: int, tokens: str, text: str = "text.txt") -> Options:
    """A harvest after the last layer."""
    return Options(dataset=str(folder / text), layers=str(n_layers - 1), tokens=tokens, context=WINDOW)


def print_check(n_tokens: int, rounds: int, toy: bool) -> None:
    """All of it, as a table."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _print_check(n_tokens, rounds, toy)
    finally:
        torch.set_num_threads(before)


def _print_check(n_tokens: int, rounds: int, toy: bool) -> None:
    sizes = TOY if toy else Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt", n_tokens)
        rates = measure_rates(sizes, rounds)
        machines = this_machine(rates, disk_rate(folder, sizes.copied))
        print(f"rates: products {rates.operations / 1e9:,.1f} GFLOP/s, memory {rates.bytes / 1e9:,.1f} GB/s, ", end="")
        print(f"disk {machines.disk / 1e9:,.2f} GB/s")
        print(f"{'':<58}{'predicted':>11}{'measured':>11}{'x':>7}", flush=True)
        lines, model_share = check_models(folder, sizes, rates, rounds)
        print_lines(lines)
        loaded = random_model(folder / "model_{}_{}".format(*sizes.models[0]), *sizes.models[0])
        print_lines(check_planning(folder, loaded, sizes.models[0][1], n_tokens, rounds))
        machines = replace(machines, model_share=model_share)
        print_lines(check_harvest(folder, sizes.models[0], n_tokens, machines, rounds))
        lines, step_share = check_steps(sizes, rates, rounds)
        print_lines(lines)
        print_lines(check_sweep(folder, sizes, replace(machines, step_share=step_share), rounds))
    print(f"shares: the forward keeps {model_share:.0%} of the products' rate, a step {step_share:.0%} of its floor")
    print(f"machine   {machine('cpu')}, torch {torch.__version__}, one thread a process")


def print_lines(lines: Sequence[Line]) -> None:
    """Predicted over measured, but for what calibrated."""
    for line in lines:
        # A difference of two times may be nothing on a busy machine.
        known = not line.calibrates and line.measured > 0
        ratio = f"{line.predicted / line.measured:.2f}" if known else "-"
        print(f"{line.what:<58}{_seconds(line.predicted):>11}{_seconds(line.measured):>11}{ratio:>7}", flush=True)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{1e3 * seconds:,.1f} ms"
