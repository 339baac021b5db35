"""Everything that is shown of the latents of one run: what pages and exports are written from."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from cache_spec.copies import Copies
from cache_spec.errors import UserError
from evaluate.cases import check_sae
from evaluate.features.collect import Firings, collect
from evaluate.features.contexts import Contexts, read_contexts
from evaluate.features.lens import Lens, load_for_lens, logit_lens, nearest
from evaluate.features.reading import Reading, make_reading
from evaluate.features.running import Best
from evaluate.features.selection import check_selection, select
from evaluate.features.words import Words, words_of
from evaluate.runs import Run, one_run, open_cache
from train.reading import read_device
from train.run_folder import load_run

N_BANDS, PER_BAND = 5, 3  # quantile examples: fifths of the firings by value, and examples from each


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to show and from where. model: for the logit lens; empty for none. tokens: the most rows to read.

    examples: top examples of a latent. before, after: tokens of context around the one it fires on.
    """

    run: Path
    latents: str = "all"
    cache: str | Path | None = None
    copies: Copies | None = None
    device: str = "cpu"
    model: str = ""
    examples: int = 10
    tokens: int = 1_000_000
    before: int = 16
    after: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Band:
    """A share of a latent's firings by value, from `low` to `high`, and examples: their places in the contexts."""

    low: float
    high: float
    share: float
    examples: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One latent: its top examples (places in the contexts), and its quantile bands, the highest first."""

    latent: int
    top: tuple[int, ...]
    bands: tuple[Band, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """All of it. latents: those shown, [n]. lens, nearest: in their order; lens is None without a model."""

    run: Run
    reading: Reading
    firings: Firings
    latents: np.ndarray
    shown: tuple[Shown, ...]
    contexts: Contexts
    words: Words
    lens: Lens | None
    nearest: tuple[np.ndarray, np.ndarray]

    @cached_property
    def has_page(self) -> frozenset[int]:
        """The latents shown, to look one up."""
        return frozenset(self.latents.tolist())

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """The text of every token that is shown."""
        parts = [self.contexts.tokens]
        parts += [] if self.contexts.masked_tokens is None else [self.contexts.masked_tokens]
        parts += [] if self.lens is None else [self.lens.top, self.lens.bottom]
        ids = np.unique(np.concatenate([part.reshape(-1) for part in parts]))
        ids = ids[ids >= 0].tolist()
        return dict(zip(ids, self.words.texts(ids), strict=True))


def gather(asked: Asked) -> Found:
    """Read the run, its cache and, if given, the model. Raises UserError for what a user can mend, before any pass."""
    if asked.examples < 1:
        raise UserError(f"--examples is {asked.examples}; give a whole number of 1 or more")
    if min(asked.before, asked.after) < 0:
        raise UserError(f"--before {asked.before} and --after {asked.after} count tokens; give 0 or more")
    device = read_device(asked.device)
    run = one_run(asked.run)
    sae = load_run(asked.run, device).sae
    check_selection(asked.latents, sae.d_sae)
    cache = open_cache(run, asked.cache, asked.copies)
    hook = cache.hook(run.hook)
    if not sae.is_transcoder:
        check_sae(sae.cpu(), hook)
    elif sae.d_model != hook.d_model:
        raise UserError(f"{run.name} reads {sae.d_model} dimensions and {hook.name} has {hook.d_model}; train it again")
    sae = sae.to(device)
    words = words_of(cache, asked.model)
    directions = sae.W_dec.detach()
    loaded = load_for_lens(asked.model, sae.d_out, device) if asked.model else None
    reading = make_reading(cache, hook, sae, device=device, most_rows=asked.tokens)
    firings = collect(reading, n_top=asked.examples, seed=asked.seed)
    latents = select(asked.latents, firings.density, asked.seed)
    if not len(latents):
        raise UserError(
            f"--latents {asked.latents} names no latent of {run.name}: every one fires; nothing was written"
        )
    examples = _Examples()
    shown = tuple(_shown(int(latent), firings, examples) for latent in latents)
    return Found(
        run=run,
        reading=reading,
        firings=firings,
        latents=latents,
        shown=shown,
        contexts=examples.read(reading, asked),
        words=words,
        lens=None if loaded is None else logit_lens(loaded, _rows(directions, latents)),
        nearest=nearest(directions, latents),
    )


def _rows(directions: Tensor, latents: np.ndarray) -> Tensor:
    return directions[latents.tolist()]


class _Examples:
    """Examples to read the contexts of, each (latent, row) once, in the order that they are named."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], int] = {}

    def place(self, latent: int, row: int) -> int:
        return self._places.setdefault((latent, row), len(self._places))

    def read(self, reading: Reading, asked: Asked) -> Contexts:
        pairs = np.array(list(self._places), dtype=np.int64).reshape(-1, 2)
        return read_contexts(reading, pairs[:, 0], pairs[:, 1], before=asked.before, after=asked.after)


def _shown(latent: int, firings: Firings, examples: _Examples) -> Shown:
    rows = firings.top.rows[latent]
    top = tuple(examples.place(latent, int(row)) for row in rows[rows >= 0])
    return Shown(latent=latent, top=top, bands=tuple(_bands(latent, firings.sample, examples)))


def _bands(latent: int, sample: Best, examples: _Examples) -> Iterator[Band]:
    """Fifths of the sampled firings by value, the highest first; none where there are too few to split."""
    there = sample.rows[latent] >= 0
    values, rows = sample.values[latent][there], sample.rows[latent][there]
    if len(values) < N_BANDS * PER_BAND:
        return
    for part in np.array_split(np.argsort(-values, kind="stable"), N_BANDS):
        chosen = part[np.linspace(0, len(part) - 1, PER_BAND).round().astype(int)]
        yield Band(
            low=float(values[part].min()),
            high=float(values[part].max()),
            share=len(part) / len(values),
            examples=tuple(examples.place(latent, int(row)) for row in rows[chosen]),
        )
