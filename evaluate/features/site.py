"""The feature pages: a folder that a browser opens from the disk, with no network and no server.

Each latent has a small page of its own. What it shows lies in scripts, PER_SHARD latents each, that call `granary` with
JSON: a page from the disk may load a script beside it, but not read a file. Pages put text from data into the document
as text alone.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluate.cache_model import public_name
from evaluate.features.folder import whole_folder
from evaluate.features.gather import Found, Shown
from evaluate.features.running import bin_edges

MADE_BY = "python -m evaluate features"
PER_SHARD = 64
INDEX, WORDS = "data/index.js", "data/words.js"
_PAGES = Path(__file__).parent.parent / "page"
_STYLES, _SCRIPT = ("report.css", "features.css"), "features.js"
_MOST_PEAKS = 3  # tokens that stand for a latent in the index


def write_site(found: Found, out: Path, facts: dict[str, Any]) -> int:
    """Write all pages to the folder `out`, or nothing; returns their bytes. facts: kept in the folder."""
    vocabulary = _Vocabulary(found.vocabulary)
    environment = Environment(
        loader=FileSystemLoader(_PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with whole_folder(out, {"made_by": MADE_BY, **facts}) as folder:
        (folder / "data").mkdir()
        (folder / "latents").mkdir()
        _write(folder / "style.css", "\n".join((_PAGES / name).read_text("utf-8") for name in _STYLES))
        _write(folder / "features.js", (_PAGES / _SCRIPT).read_text("utf-8"))
        _write_latents(found, folder, vocabulary, environment)
        _write(folder / INDEX, _call("index", _index(found, vocabulary)))
        _write(folder / WORDS, _call("words", vocabulary.texts))
        page = environment.get_template("features_index.html.jinja")
        _write(folder / "index.html", page.render(about=about(found), run=found.run, n=len(found.shown)))
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


class _Vocabulary:
    """The texts of the tokens that are shown, numbered from 0 in the order of their ids."""

    def __init__(self, texts: dict[int, str]) -> None:
        self._numbers = {token: number for number, token in enumerate(texts)}
        self.texts = list(texts.values())

    def number(self, token: int) -> int:
        return self._numbers[token]


def _write_latents(found: Found, folder: Path, vocabulary: _Vocabulary, environment: Environment) -> None:
    page = environment.get_template("features_latent.html.jinja")
    for start in range(0, len(found.shown), PER_SHARD):
        some = range(start, min(start + PER_SHARD, len(found.shown)))
        latents = {found.shown[i].latent: _latent(found, i, vocabulary) for i in some}
        shard = f"data/{start // PER_SHARD:05d}.js"
        _write(folder / shard, _call("latents", latents))
        for i in some:
            latent = found.shown[i].latent
            _write(
                folder / "latents" / f"{latent}.html",
                page.render(
                    run=found.run,
                    latent=latent,
                    shard=shard,
                    sentence=sentence(found, latent),
                    before=found.shown[i - 1].latent if i else None,
                    after=found.shown[i + 1].latent if i + 1 < len(found.shown) else None,
                ),
            )


def about(found: Found) -> dict[str, Any]:
    """What the pages say of where all this comes from, in words."""
    reading, firings = found.reading, found.firings
    trained = firings.n_rows - firings.n_held_out
    dead = int((firings.counts[found.latents] == 0).sum())
    return {
        "rows": f"{firings.n_rows:,} clean rows of {Path(reading.cache.place).name}, {reading.hook.hook_point}: "
        f"{firings.n_held_out:,} held out of training and {trained:,} of training",
        "model": public_name(reading.cache.plan.model.get("id")),
        "text": public_name(reading.cache.plan.source.get("id")),
        "d_sae": reading.sae.d_sae,
        "dead": dead,
        "missing": found.words.missing,
        "lens": found.lens is not None,
        "masked": masked_sentence(found),
    }


def masked_sentence(found: Found) -> str:
    """How the masked text was made; empty if there is none."""
    if found.reading.masked is None:
        return ""
    variant = found.reading.cache.variant(found.reading.masked[1])
    by = f"'{variant.mask_string}'" if variant.mask_string else "a random token"
    what = "words" if variant.kind == "mask_word" else "tokens"
    return f"{100 * variant.mask_prob:.3g} % of the {what} are replaced by {by}"


def sentence(found: Found, latent: int) -> str:
    """What there is to say of one latent in one sentence; that it is dead, if it is."""
    count, n_rows = int(found.firings.counts[latent]), found.firings.n_rows
    if not count:
        return f"This latent is dead here: it fires on none of the {n_rows:,} rows that were read."
    largest = float(found.firings.top.values[latent, 0])
    return (
        f"Fires on {count:,} of {n_rows:,} rows ({100 * count / n_rows:.3g} %), "
        f"at {found.firings.sums[latent] / count:.3g} on average and {largest:.3g} at most."
    )


def _latent(found: Found, i: int, vocabulary: _Vocabulary) -> dict[str, Any]:
    """The data of one latent's page. Names are short, for there may be thousands of them."""
    shown, firings = found.shown[i], found.firings
    latent = shown.latent
    counted = np.flatnonzero(firings.bins[latent])
    data: dict[str, Any] = {
        "count": int(firings.counts[latent]),
        "kept": _kept(found, latent),
        "top": [_example(found, place, vocabulary) for place in shown.top],
        "bands": [
            [_short(b.low), _short(b.high), [_example(found, place, vocabulary) for place in b.examples]]
            for b in shown.bands
        ],
        "near": [
            [int(other), round(float(cosine), 3), int(other in found.has_page)]
            for other, cosine in zip(found.nearest[0][i], found.nearest[1][i], strict=True)
        ],
    }
    if len(counted):
        first, last = int(counted[0]), int(counted[-1])
        edges = [_short(edge) for edge in bin_edges()[first : last + 2]]
        data["bins"] = [edges, firings.bins[latent, first : last + 1].tolist()]
    if firings.masked_counts is not None:
        data["masked"] = int(firings.masked_counts[latent])
    if found.lens is not None:
        for name, ids, values in (
            ("up", found.lens.top, found.lens.top_logits),
            ("down", found.lens.bottom, found.lens.bottom_logits),
        ):
            data[name] = [
                [vocabulary.number(int(token)), _short(value)] for token, value in zip(ids[i], values[i], strict=True)
            ]
    return data


def _kept(found: Found, latent: int) -> list[float | None]:
    """What is left of its clean values in masked text: where the row's own token is still there, and where not."""
    clean, masked = found.firings.kept[:, 0, latent], found.firings.kept[:, 1, latent]
    return [round(float(m / c), 3) if c > 0 else None for c, m in zip(clean, masked, strict=True)]


def _example(found: Found, place: int, vocabulary: _Vocabulary) -> list[Any]:
    """[document, window, position, held out, place of the row's token, tokens, clean values, masked values, replaced].

    Values are [place, value, place, value, ...] where they are not 0; replaced is [place, token, ...].
    """
    contexts, plan = found.contexts, found.reading.cache.plan
    there = np.flatnonzero(contexts.tokens[place] >= 0)
    tokens = contexts.tokens[place][there]
    line: list[Any] = [
        int(contexts.docs[place]),
        int(contexts.windows[place]),
        int(contexts.positions[place]),
        int(contexts.rows[place] >= plan.n_train_rows),
        int(np.searchsorted(there, contexts.before)),
        [vocabulary.number(int(token)) for token in tokens],
        _sparse(contexts.values[place][there], _short),
    ]
    if contexts.masked_tokens is None or contexts.masked_values is None:
        return line
    masked = contexts.masked_tokens[place][there]
    replaced = np.where(masked != tokens, masked + 1, 0)
    return [
        *line,
        _sparse(contexts.masked_values[place][there], _short),
        _sparse(replaced, lambda token: vocabulary.number(int(token) - 1)),
    ]


def _sparse(values: np.ndarray, write: Callable[[Any], Any]) -> list[Any]:
    return [part for i in np.flatnonzero(values) for part in (int(i), write(values[i]))]


def _index(found: Found, vocabulary: _Vocabulary) -> dict[str, Any]:
    """The columns of the index: a value for each latent shown, in order."""
    firings = found.firings
    return {
        "d_sae": found.reading.sae.d_sae,
        "rows": firings.n_rows,
        "latent": [s.latent for s in found.shown],
        "count": firings.counts[found.latents].tolist(),
        "max": [_short(v) for v in np.maximum(firings.top.values[found.latents, 0], 0)],
        "kept": None if found.reading.masked is None else [_kept(found, s.latent)[0] for s in found.shown],
        "peaks": [list(_peaks(found, s, vocabulary)) for s in found.shown],
        "up": None
        if found.lens is None
        else [[vocabulary.number(int(token)) for token in ids[:_MOST_PEAKS]] for ids in found.lens.top],
    }


def _peaks(found: Found, shown: Shown, vocabulary: _Vocabulary) -> Iterator[int]:
    """The tokens that the latent's best examples are at, each once."""
    tokens = dict.fromkeys(int(found.contexts.tokens[place, found.contexts.before]) for place in shown.top)
    for token in list(tokens)[:_MOST_PEAKS]:
        yield vocabulary.number(token)


def _short(value: float) -> float:
    """Five digits are more than a shade or a page shows."""
    return float(f"{float(value):.5g}")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _call(name: str, data: Any) -> str:
    """A script that hands over JSON. ASCII, and without the characters that could end or open an element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e")
    return f"granary.{name}({escaped});\n"
