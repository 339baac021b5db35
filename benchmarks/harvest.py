"""How much of a model's speed a harvest keeps, and what the reuse of beginnings saves.

python -m benchmarks.harvest [--device cpu|cuda] [--tokens 256k] [--rounds 3] [--compile]

A random model is built and saved, and made-up text is harvested with it, clean and masked. `bare` is the cut model
over the same windows in the same batches, in a plain loop that keeps nothing. `harvest` is the whole of run.harvest,
planning and pilot included; `shards` is its part from the plan on. Each round times bare and harvest, one after the
other, and the table has their ratio round by round. On a CPU the model is that of Pythia-70m's shape (6 layers,
d = 512, harvested after layer 3); on a GPU it has Gemma-2-2B's shape up to layer 12, which is all that is ever run of
it, in bfloat16. Both have a small vocabulary, which changes no shape that matters.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, PreTrainedConfig, PreTrainedTokenizerFast

from cache_spec.command import run_command
from cache_spec.layout import PLAN
from cache_spec.seeds import derive_seed
from harvest import run
from harvest.model import LoadedModel, load_model
from harvest.options import Options
from harvest.pipeline import Job, make_shards
from harvest.planning import make_plan
from harvest.prefix import NEVER, WORTH, reusing_batches, saved_share
from harvest.reader import Reader, open_reader
from harvest.request import Request, make_request
from harvest.shard import prepare_shard

REUSE_WINDOW = 128  # tokens; in long windows something is replaced early, and little can be reused
WORDS = [f"word{i}" for i in range(2000)]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model to build and the harvest to time it by."""

    config: PreTrainedConfig
    dtype: str
    layer: int
    window_tokens: int


def cpu_shape(n_vocab: int) -> Shape:
    """Pythia-70m's."""
    config = GPTNeoXConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
        vocab_size=n_vocab,
    )
    return Shape(config=config, dtype="float32", layer=3, window_tokens=1024)


def gpu_shape(n_vocab: int) -> Shape:
    """Gemma-2-2B's, as far as it is run."""
    config = Gemma2Config(
        hidden_size=2304,
        num_hidden_layers=13,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=9216,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        max_position_embeddings=8192,
        vocab_size=n_vocab,
    )
    return Shape(config=config, dtype="bfloat16", layer=12, window_tokens=1024)


def toy_shape(n_vocab: int) -> Shape:
    """For a look at whether this file works."""
    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=n_vocab
    )
    return Shape(config=config, dtype="float32", layer=1, window_tokens=32)


def save_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a random model of the shape and its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed("benchmarks/harvest"))
        model = AutoModelForCausalLM.from_config(shape.config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<unk>", "...", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_text(path: Path, n_tokens: int) -> None:
    """Documents of 20 to 1,000 random words, blank lines between them, a little more than is asked for."""
    rng = np.random.default_rng(derive_seed("benchmarks/harvest_text"))
    with path.open("w") as file:
        left = int(n_tokens * 1.1) + 20_000
        while left > 0:
            words = rng.choice(WORDS, rng.integers(20, 1000))
            file.write(" ".join(words) + "\n\n")
            left -= len(words)


def bare_seconds(reader: Reader, batches: list[torch.Tensor]) -> float:
    """The cut model over batches that are on its device, nothing kept."""
    _wait(reader.device)
    start = time.perf_counter()
    with torch.inference_mode():
        for tokens in batches:
            reader.read(tokens)
    _wait(reader.device)
    return time.perf_counter() - start


def harvest_seconds(loaded: LoadedModel, request: Request, batch_windows: int, compile: bool) -> tuple[float, float]:
    """Seconds of a whole harvest into a new folder, and of its part after planning."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        out = Path(folder) / "cache"
        start = time.time()
        run.harvest(loaded, request, out, batch_windows=batch_windows, compile=compile)
        end = time.time()
        return end - start, end - (out / PLAN).stat().st_mtime  # the plan is written when planning is done


def pass_seconds(job: Job, n_shards: int) -> float:
    """Seconds to make the first shards, without writing them."""
    _wait(job.reader.device)
    start = time.perf_counter()
    make_shards(job, range(n_shards), lambda *_: None, lambda _: None)
    return time.perf_counter() - start


def open_job(loaded: LoadedModel, reader: Reader, request: Request, batch_windows: int, pad: bool) -> Job:
    """What a harvest runs, planned and not written."""
    with quiet():
        plan, windows = make_plan(loaded, reader, request)
    return Job(
        plan=plan,
        windows=windows,
        tokenizer=loaded.tokenizer,
        reader=reader,
        batch_windows=run.choose_batch_windows(plan, reader.device, batch_windows),
        pad=pad,
    )


def all_batches(job: Job) -> list[torch.Tensor]:
    """What the model reads in a harvest without reuse: every window in every variant, on the model's device."""
    batches = []
    for number in range(job.plan.n_shards):
        inputs = prepare_shard(job.plan, job.windows, job.tokenizer, number).inputs
        for first in range(0, inputs.shape[1], job.batch_windows):
            batch = inputs[:, first : first + job.batch_windows].reshape(-1, job.plan.window_tokens)
            batches.append(torch.from_numpy(batch.astype(np.int64)).to(job.reader.device))
    return batches


def print_ratios(loaded: LoadedModel, request: Request, batch_windows: int, compile: bool, rounds: int) -> None:
    """The table of rounds, and the median of each ratio."""
    with open_reader(loaded, request.hook_points, compile=compile) as reader:
        job = open_job(loaded, reader, request, batch_windows, pad=compile or reader.device.type == "cuda")
        batches = all_batches(job)
        n_tokens = sum(tokens.numel() for tokens in batches)
        print(f"{n_tokens:,} tokens in 2 variants, {job.batch_windows} windows at once, {job.plan.n_shards} shards")
        print(f"{'round':<8}{'bare tokens/s':>15}{'harvest':>12}{'shards':>12}{'harvest/bare':>15}{'shards/bare':>13}")
        bare_seconds(reader, batches[:2])
        ratios = []
        for i in range(rounds):
            # Every other round the other way about, so that a machine that slows down favours neither.
            first = bare_seconds(reader, batches) if i % 2 == 0 else 0.0
            whole, shards = harvest_seconds(loaded, request, batch_windows, compile)
            bare = first or bare_seconds(reader, batches)
            ratios.append((bare / whole, bare / shards))
            rates = [n_tokens / seconds for seconds in (bare, whole, shards)]
            print(f"{i + 1:<8}{rates[0]:>15,.0f}{rates[1]:>12,.0f}{rates[2]:>12,.0f}", end="")
            print(f"{ratios[-1][0]:>15.3f}{ratios[-1][1]:>13.3f}", flush=True)
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    print(f"{'median':<47}{medians[0]:>15.3f}{medians[1]:>13.3f}\n")


def print_reuse(loaded: LoadedModel, request: Request, batch_windows: int, rounds: int) -> None:
    """What reuse saves in tokens and in time, at three rates of masking, where it is worth it and where not."""
    window_tokens = min(REUSE_WINDOW, request.window_tokens)
    print(f"prefix reuse, in windows of {window_tokens} tokens (used by a harvest from {WORTH:.0%} of the tokens on)")
    print(f"{'':<14}{'tokens saved':>14}{'time saved':>12}   round by round")
    with open_reader(loaded, request.hook_points) as reader:
        if not reader.can_continue(window_tokens):
            print("this model cannot go on from a beginning")
            return
        for p in (0.3, 0.05, 0.01):
            masked = replace(request.variants[1], mask_prob=p)
            asked = replace(request, variants=(request.variants[0], masked), window_tokens=window_tokens)
            job = open_job(loaded, reader, asked, batch_windows, pad=reader.device.type == "cuda")
            n_shards = min(2, job.plan.n_shards)
            first = prepare_shard(job.plan, job.windows, job.tokenizer, 0).first
            saved = saved_share(list(reusing_batches(first, window_tokens, job.batch_windows)), first, window_tokens)
            whole, reused = replace(job, worth=NEVER), replace(job, worth=-NEVER)
            savings = [1 - pass_seconds(reused, n_shards) / pass_seconds(whole, n_shards) for _ in range(rounds)]
            shown = " ".join(f"{saving:.1%}" for saving in savings)
            print(f"p = {p:<10g}{saved:>14.1%}{statistics.median(savings):>12.1%}   {shown}", flush=True)


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu, or cuda for the larger model.")] = "cpu",
    tokens: Annotated[str, typer.Option(help="Rows of each variant.")] = "256k",
    rounds: Annotated[int, typer.Option(help="How often each thing is timed.")] = 3,
    batch_windows: Annotated[int, typer.Option(help="As for python -m harvest.")] = 0,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model, in both.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="A model of no interest, to see this file work.")] = False,
) -> None:
    """Print tokens/s of a whole harvest over tokens/s of the bare model, and what prefix reuse saves."""
    tokenizer = make_tokenizer()
    shape = (toy_shape if toy else cpu_shape if device == "cpu" else gpu_shape)(len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        with quiet():
            save_model(shape, tokenizer, Path(folder) / "model")
            loaded = load_model(str(Path(folder) / "model"), device=device, dtype=shape.dtype)
        options = Options(dataset=str(text), layers=str(shape.layer), tokens=tokens, context=shape.window_tokens)
        request = make_request(loaded, loaded.name, options)
        write_text(text, request.n_tokens)
        print(f"{shape.config.model_type}, d = {loaded.d_model}, layer {shape.layer} of {loaded.n_layers}", end="")
        print(f", {shape.dtype} on {_name(loaded.device)}{', compiled' if compile else ''}")
        print_ratios(loaded, request, batch_windows, compile, rounds)
        print_reuse(loaded, request, batch_windows, rounds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.get_num_threads()} threads)"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed inside."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    run_command(app)
