"""Neuronpedia's files: the export folder that anyone can import, and the bodies of its upload interface.

Field names are Neuronpedia's own: its `db_models` for the export folder, its route `feature/upload-batch` for the
bodies. What we do not measure is left empty, as its own exporter leaves it.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.hook_point import HookPoint
from evaluate.cache_model import public_name
from evaluate.features.gather import Band, Found, Shown
from evaluate.features.running import bin_edges

BATCH = 128  # most features of one upload
MOST_TOKENS = 1024  # of one activation
N_BARS = 40
UPLOADS = "upload"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the source is called on Neuronpedia. source: "<layer>-<set>". at: the time that the records state."""

    model: str
    source_set: str
    source: str
    release: str
    creator: str
    creator_id: str
    at: str


def write_export(found: Found, names: Names, folder: Path) -> tuple[list[Path], int]:
    """Write everything into `folder`; returns the upload bodies' files and how many latents are in them.

    Neuronpedia takes no feature without an activation, so latents that never fired here are in the export folder alone.
    """
    source = folder / names.model / names.source
    (source / "features").mkdir(parents=True)
    (source / "activations").mkdir()
    for name, record in _heads(found, names).items():
        _write_lines(source / f"{name}.jsonl", [record])
    uploads: list[Path] = []
    (folder / UPLOADS).mkdir()
    n_live = 0
    for number, start in enumerate(range(0, len(found.shown), BATCH)):
        some = range(start, min(start + BATCH, len(found.shown)))
        activations = {i: list(_activations(found, found.shown[i])) for i in some}
        _write_lines(source / "features" / f"batch-{number}.jsonl.gz", (feature(found, i, names) for i in some))
        records = (activation(found, i, part, names) for i in some for part in activations[i])
        _write_lines(source / "activations" / f"batch-{number}.jsonl.gz", records)
        live = [i for i in some if activations[i]]
        n_live += len(live)
        if live:
            body = {
                "modelId": names.model,
                "source": names.source,
                "features": [upload(found, i, activations[i]) for i in live],
            }
            uploads.append(folder / UPLOADS / f"batch-{number:05d}.json")
            uploads[-1].write_text(json.dumps(body, allow_nan=False))
    return uploads, n_live


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _heads(found: Found, names: Names) -> dict[str, dict[str, Any]]:
    """release, model, sourceset and source: one record each."""
    plan, reading = found.reading.cache.plan, found.reading
    made = {"creatorId": names.creator_id, "createdAt": names.at}
    release = {
        "name": names.release,
        "description": f"{found.run.name}, trained by granary",
        "creatorName": names.creator,
        "visibility": "PUBLIC",
        "descriptionShort": found.run.name,
        "urls": [],
        "creatorNameShort": names.creator,
    }
    model = {
        "id": names.model,
        "instruct": names.model.endswith("-it"),
        "displayNameShort": names.model,
        "displayName": names.model,
        "dimension": reading.hook.d_model,
        "layers": int(plan.model.get("n_layers", 0)),
        "visibility": "PUBLIC",
        "updatedAt": names.at,
    }
    source_set = {
        "modelId": names.model,
        "name": names.source_set,
        "creatorName": names.creator,
        "releaseName": names.release,
        "description": f"{found.run.recipe}, {reading.hook.hook_point}, {reading.sae.d_sae} latents",
        "visibility": "PUBLIC",
    }
    source = {
        "id": names.source,
        "modelId": names.model,
        "setName": names.source_set,
        "hasDashboards": True,
        "visibility": "PUBLIC",
        "num_prompts": found.firings.n_rows // plan.window_tokens,
        "num_tokens_in_prompt": plan.window_tokens,
        "dataset": public_name(plan.source.get("id")),
        "notes": f"cache {plan.cache_id}, {found.firings.n_rows} rows",
    }
    return {
        "release": {**release, **made},
        "model": {**model, **made},
        "sourceset": {**source_set, **made},
        "source": {**source, **made},
    }


@dataclass(frozen=True, kw_only=True)
class _Activation:
    """One context of a latent: its place in the contexts, and the band that it stands for; None for a top example."""

    place: int
    band: Band | None


def _activations(found: Found, shown: Shown) -> Iterator[_Activation]:
    for place in shown.top:
        yield _Activation(place=place, band=None)
    used = set(shown.top)
    for band in shown.bands:
        for place in band.examples:
            if place not in used:
                used.add(place)
                yield _Activation(place=place, band=band)


def _text(found: Found, place: int) -> tuple[list[str], list[float], int]:
    """(tokens, values, place of the example's own token among them) of one context, clean."""
    contexts = found.contexts
    there = np.flatnonzero(contexts.tokens[place] >= 0)
    assert len(there) <= MOST_TOKENS
    tokens = [found.vocabulary[int(token)] for token in contexts.tokens[place][there]]
    return tokens, [_short(v) for v in contexts.values[place][there]], int(np.searchsorted(there, contexts.before))


def _bins(band: Band | None) -> tuple[float, float, float]:
    """(low, high, share) of a band; for a top example -1, as Neuronpedia marks one."""
    return (-1.0, -1.0, -1.0) if band is None else (_short(band.low), _short(band.high), round(band.share, 4))


def upload(found: Found, i: int, activations: Iterable[_Activation]) -> dict[str, Any]:
    """One feature of an upload."""
    bodies = []
    for part in activations:
        tokens, values, _ = _text(found, part.place)
        body: dict[str, Any] = {"tokens": tokens, "values": values}
        if part.band is not None:
            low, high, share = _bins(part.band)
            body |= {"quantileMin": low, "quantileMax": high, "quantileFraction": share}
        bodies.append(body)
    return {
        "index": found.shown[i].latent,
        "density": float(found.firings.density[found.shown[i].latent]),
        **{
            name: [{"token": token, "value": value} for token, value in zip(tokens, logits, strict=True)]
            for name, (tokens, logits) in zip(("topLogits", "bottomLogits"), _lens(found, i), strict=False)
        },
        "explanations": [],
        "activations": bodies,
    }


def feature(found: Found, i: int, names: Names) -> dict[str, Any]:
    """One line of features/batch-N.jsonl."""
    latent, firings = found.shown[i].latent, found.firings
    heights, values = _bars(firings.bins[latent])
    (up, up_logits), (down, down_logits) = _lens(found, i) or (([], []), ([], []))
    empty = {
        f"{name}_{part}": []
        for name, parts in (
            ("neuron_alignment", ("indices", "values", "l1")),
            ("correlated_neurons", ("indices", "pearson", "l1")),
            ("correlated_features", ("indices", "pearson", "l1")),
            ("logits_hist_data", ("bar_heights", "bar_values")),
        )
        for part in parts
    }
    return {
        "modelId": names.model,
        "layer": names.source,
        "index": str(latent),
        "creatorId": names.creator_id,
        "createdAt": names.at,
        "maxActApprox": _short(max(0.0, float(firings.top.values[latent, 0]))),
        "hasVector": True,
        "vector": [_short(v) for v in found.reading.sae.W_dec[latent].tolist()],
        "vectorLabel": None,
        "hookName": HookPoint.parse(found.reading.hook.hook_point).tl_name,
        "topkCosSimIndices": found.nearest[0][i].tolist(),
        "topkCosSimValues": [_short(v) for v in found.nearest[1][i]],
        **empty,
        "pos_str": up,
        "pos_values": up_logits,
        "neg_str": down,
        "neg_values": down_logits,
        "frac_nonzero": float(firings.density[latent]),
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": values,
        "decoder_weights_dist": [],
    }


def activation(found: Found, i: int, part: _Activation, names: Names) -> dict[str, Any]:
    """One line of activations/batch-N.jsonl."""
    tokens, values, place = _text(found, part.place)
    low, high, share = _bins(part.band)
    latent = found.shown[i].latent
    return {
        "id": _identity(names.model, names.source, str(latent), str(found.contexts.rows[part.place])),
        "tokens": tokens,
        "index": str(latent),
        "layer": names.source,
        "modelId": names.model,
        "maxValue": max(values),
        "maxValueTokenIndex": int(np.argmax(values)),
        "minValue": min(values),
        "values": values,
        "creatorId": names.creator_id,
        "createdAt": names.at,
        "dataSource": public_name(found.reading.cache.plan.source.get("id")),
        "dataIndex": str(found.contexts.docs[part.place]),
        "binMin": low,
        "binMax": high,
        "binContains": share,
        "qualifyingTokenIndex": place,
    }


def _lens(found: Found, i: int) -> tuple[tuple[list[str], list[float]], tuple[list[str], list[float]]] | tuple[()]:
    """(tokens, logits) that latent i raises, and that it lowers; nothing without a model."""
    if found.lens is None:
        return ()
    lens = found.lens
    up, down = (
        ([found.vocabulary[int(token)] for token in ids[i]], [_short(v) for v in logits[i]])
        for ids, logits in ((lens.top, lens.top_logits), (lens.bottom, lens.bottom_logits))
    )
    return up, down


def _bars(bins: np.ndarray) -> tuple[list[float], list[float]]:
    """Counts in N_BARS bars of equal width up to the largest value, and the middle of each, of log-spaced bins."""
    counted = np.flatnonzero(bins)
    if not len(counted):
        return [], []
    edges = bin_edges()
    middles = np.sqrt(edges[counted] * edges[counted + 1])
    heights, sides = np.histogram(middles, N_BARS, (0.0, float(edges[counted[-1] + 1])), weights=bins[counted])
    return heights.tolist(), [_short(v) for v in (sides[:-1] + sides[1:]) / 2]


def _identity(*parts: str) -> str:
    """25 lower-case letters and digits, as Neuronpedia's own ids have; the same for the same parts."""
    return "g" + hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:24]


def _short(value: float) -> float:
    return float(f"{float(value):.5g}")
