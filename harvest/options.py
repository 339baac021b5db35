"""The options of `python -m harvest`: the words that --help shows, and what is checked before a model is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.counts import parse_count
from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.plan import MAX_VARIANTS, MAX_WINDOW_TOKENS

MASK_KINDS = {"token": "mask", "word": "mask_word"}  # --mask-unit, and what the plan calls it

# what to read and where to put it
Model = Annotated[
    str,
    typer.Option(
        help="Short name (tiny, pythia-70m, pythia-160m, gpt2, gemma-2-2b, llama-3.2-1b, qwen3-0.6b, smollm2-135m), "
        "hub id (owner/name[@revision]) or local folder of any causal language model that transformers knows."
    ),
]
Out = Annotated[
    str,
    typer.Option(
        help="Folder of the cache: new, empty, or an unfinished cache to go on with. Or the URL of one in an object "
        "store (s3://bucket/key, gs://, az://, file://); docs/stores.md."
    ),
]
Dataset = Annotated[
    str,
    typer.Option(
        help="pile-cc, pile, fineweb, openwebtext; a hub data set (owner/name[:config[:split]][#column]"
        "[@revision]); a .txt (blank lines between documents), .jsonl or .parquet (field 'text') or a folder of them; "
        "or 'embedded'. Default: what suits the model's short name."
    ),
]
Layers = Annotated[
    str,
    typer.Option(
        help="Hook points, comma separated, all read in one pass: 8, layers.8, model.layers.8 or resid_post.8 (after "
        "layer 8, the first is 0), resid_pre.8, attn_out.8, mlp_out.8, blocks.8.hook_mlp_out. Default: the short "
        "name's layer."
    ),
]
Tokens = Annotated[
    str, typer.Option(help="Rows of each variant, train and held out together: 500k, 1M, 2.5B, ...; rounded down.")
]
Context = Annotated[
    int, typer.Option(help="Tokens of a window, which the model sees at once; 0: 1024 or what the model allows.")
]
HeldOut = Annotated[
    float, typer.Option(help="Share of the rows, 0 to 0.5, that comes from documents kept from training.")
]
Seed = Annotated[int, typer.Option(help="Decides masks, order, held-out documents and the embedded text.")]

# the variants
MaskProb = Annotated[
    str,
    typer.Option(
        help="Chance that a token is replaced in the masked variant. Several with commas are several variants "
        "(masked, masked_1, ...), each masked by itself; 0 leaves masking out."
    ),
]
MaskString = Annotated[str, typer.Option(help="What replaces a token; must be one token for the model's tokenizer.")]
MaskUnit = Annotated[
    str,
    typer.Option(help="What is drawn with that chance: each token by itself (token), or whole words (word)."),
]
RandomProb = Annotated[
    str,
    typer.Option(
        help="Chance that a token becomes a random one, in a variant 'random' (several with commas: random, random_1, "
        "...); 0 leaves it out."
    ),
]

# how to run: none of these changes which tokens are read
Device = Annotated[
    str,
    typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps; cuda takes this process' own GPU under torchrun."),
]
Dtype = Annotated[
    str, typer.Option(help="Of the model: float32, bfloat16, float16; auto keeps bfloat16, else takes float32.")
]
Attention = Annotated[
    str,
    typer.Option(
        help="How attention is computed: sdpa, eager, flash_attention_2; auto takes what transformers does for the "
        "model. Part of the plan, for it changes rounding."
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the layers: a minute to start, then faster.")]
BatchWindows = Annotated[int, typer.Option(help="Windows run at once, each in all variants; 0 chooses.")]
ScaleFactor = Annotated[
    str,
    typer.Option(
        help="Activations are stored divided by this power of two; 0: found by a short pilot run. For one hook point "
        "of several: resid_post.12=64."
    ),
]
Shard = Annotated[
    str,
    typer.Option(
        help="i/n makes every n-th shard, from the i-th on (the first is 0): start n processes, on any machines that "
        "share the disk. claim: any shard that nobody is at; start and end such processes as you like. Default: the "
        "share that torchrun (RANK, WORLD_SIZE) or Slurm (srun, arrays) say, then as claim; else claim."
    ),
]
ClaimTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds after which a process on another machine that shows no sign of life is held for dead, and its "
        "shards are made by others. On the same machine that is known at once."
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="With a URL as --out: folder in which a shard is built before it is put. Default: a temporary one.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Load the model, measure its speed, print rows, bytes and expected time; write nothing."
    ),
]

Json = Annotated[bool, typer.Option("--json", help="With --dry-run: print it as one JSON object; docs/shell.md.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that decide the content of a cache, as they were typed; no model is needed to read them."""

    dataset: str = ""
    layers: str = ""
    tokens: str = "1M"
    mask_prob: str = "0.3"
    mask_string: str = "..."
    mask_unit: str = "token"
    random_prob: str = "0"
    context: int = 0
    held_out: float = 0.05
    scale_factor: str = "0"
    seed: int = 0


def check_options(options: Options) -> None:
    """What can be said before the model is loaded, which can take minutes. Raises UserError, naming the option."""
    if not 0 <= options.held_out <= 0.5:
        raise UserError(f"--held-out is {options.held_out}, and the held-out share of the text must be from 0 to 0.5")
    parse_scales(options.scale_factor)
    if options.context and not 2 <= options.context <= MAX_WINDOW_TOKENS:
        raise UserError(f"--context is {options.context}; give 2 to {MAX_WINDOW_TOKENS:,} tokens, or 0 for the default")
    if options.mask_unit not in MASK_KINDS:
        raise UserError(f"--mask-unit is {options.mask_unit!r}; give {' or '.join(MASK_KINDS)}")
    parse_count(options.tokens, "--tokens")
    parse_layers(options.layers)
    n_others = len(parse_probabilities(options.mask_prob, "--mask-prob"))
    n_others += len(parse_probabilities(options.random_prob, "--random-prob"))
    if n_others > MAX_VARIANTS - 1:
        raise UserError(
            f"--mask-prob and --random-prob name {n_others} variants beside the clean one, and a cache holds "
            f"{MAX_VARIANTS - 1}; harvest the others into another --out"
        )


def check_json(as_json: bool, dry_run: bool) -> None:
    """Raises UserError for --json without --dry-run."""
    if as_json and not dry_run:
        raise UserError("--json says what a harvest will take; give it together with --dry-run")


def parse_layers(layers: str) -> tuple[HookPoint, ...]:
    """Each hook point once, in the order given."""
    parts = layers.split(",") if layers.strip() else []
    return tuple(dict.fromkeys(map(HookPoint.parse, parts)))


def parse_scales(text: str) -> dict[HookPoint | None, float]:
    """`16` or `resid_post.12=64,mlp_out.12=2` -> the scale factor of each hook point named, None for all others."""
    scales: dict[HookPoint | None, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not (scale == 0 or (scale > 0 and math.frexp(scale)[0] == 0.5)):
            raise UserError(
                f"--scale-factor is {text}; give a power of two such as 16, one for a hook point such as "
                "resid_post.12=64, or 0 to have it found"
            )
        scales[HookPoint.parse(name) if name else None] = scale
    return scales


def parse_probabilities(text: str, option: str) -> list[float]:
    """One probability for each variant, in the order given; a lone 0 is no variant at all."""
    parts = [part.strip() for part in text.split(",")]
    try:
        found = [float(part) for part in parts]
    except ValueError as error:
        raise UserError(
            f"{option} is {text!r}; give a probability such as 0.3, several such as 0.1,0.3,0.5, or 0"
        ) from error
    said = f"{option} is {','.join(parts)}"
    if not all(0 <= p <= 1 for p in found):
        raise UserError(f"{said}, and a probability must be from 0 to 1")
    if found == [0.0]:
        return []
    if 0.0 in found:
        raise UserError(f"{said}; leave out the 0, the clean variant is always there")
    if len(set(found)) < len(found):
        raise UserError(f"{said}, which names a probability twice; give each once")
    return found
