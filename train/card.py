"""The page of pushed SAEs on the hub, made from what their run.json and report.json say."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from cache_spec.hub import Repository
from cache_spec.markdown import front_matter, plain, table
from train.pushing import PushedRun

CONFIDENCE = 0.95
# columns of report.json that the card shows, in SAEBench's names where it has them
METRICS = (
    *("l0_raw", "explained_variance_raw", "l0", "explained_variance", "ce_loss_score", "kl_div_score", "frac_alive"),
    *("mean_absorption_fraction_score", "mean_full_absorption_score"),
    *("sae_top_1_test_accuracy", "sae_top_5_test_accuracy", "ood_gap_to_dense_1"),
)
_HELD_OUT = ("l0", "explained_variance")  # what training itself measures
_SAELENS = ("standard", "gated", "topk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the values of some seeds and its 95 % t-interval, NaN for a single one."""
    numbers, n = np.asarray(values, dtype=float), len(values)
    if n < 2:
        return float(numbers.mean()), math.nan, math.nan
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * numbers.std(ddof=1) / np.sqrt(n))
    return float(numbers.mean()), float(numbers.mean()) - reach, float(numbers.mean()) + reach


def model_card(runs: Sequence[PushedRun], repository: Repository) -> str:
    """README.md: what, data, masking, metrics with intervals, how to load."""
    cache = runs[0].facts["cache"]
    head = {"library_name": "saelens", "tags": ["saelens", "sparse-autoencoder", "granary"]}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(cache["model"])):
        head["base_model"] = str(cache["model"])
    parts = [
        front_matter(head),
        f"# Sparse autoencoders of {plain(cache['model'])}",
        f"{len(runs)} sparse autoencoder{'s' if len(runs) > 1 else ''} trained with granary on cached activations. Raw "
        "activations go in, their reconstruction comes out: every normalisation is folded into the weights.",
        "## Load one",
        _loading(runs, repository),
        "## Data",
        table(("what", "value"), [row for facts in _once(run.facts["cache"] for run in runs) for row in _data(facts)]),
        "## Masking",
        _masking(runs),
        "## Metrics",
        *_metrics(runs),
        "## The SAEs",
        table(
            ("SAE", "architecture", "latents", "k", "recipe", "seed", "tokens"),
            [[run.sae_id, *_kind(run), run.facts["config"]["seed"], f"{_tokens(run):,}"] for run in runs],
        ),
        _provenance(runs),
    ]
    return "\n\n".join(parts) + "\n"


def _loading(runs: Sequence[PushedRun], repository: Repository) -> str:
    lines = [
        "```python",
        "from sae_lens import SAE",
        "",
        f"sae = SAE.from_pretrained({json.dumps(repository.name)}, {json.dumps(runs[0].sae_id)})",
        "codes = sae.encode(activations)  # [batch, d_in] -> [batch, d_sae]",
        "```",
    ]
    if unknown := sorted({run.config["architecture"] for run in runs} - set(_SAELENS)):
        lines += ["", f"SAELens refuses {plain(', '.join(unknown))}, which it has no class for; granary reads it."]
    return "\n".join(lines)


def _data(cache: dict[str, Any]) -> list[tuple[str, object]]:
    rows = [
        ("model", cache["model"]),
        ("text", cache["dataset"]),
        ("hook point", f"{cache['tl_name']} ({cache['hf_name']})"),
        ("context", f"{cache['window_tokens']} tokens, {'with' if cache['prepend_bos'] else 'without'} BOS"),
        ("cache", cache["cache_id"]),
    ]
    target = cache.get("target")
    return [*rows, ("reconstructs", f"{target['tl_name']} ({target['hf_name']})")] if target else rows


def _masking(runs: Sequence[PushedRun]) -> str:
    masked = [run for run in runs if run.facts["config"]["masked_fraction"]]
    if not masked:
        return "None: every SAE here was trained on activations of unchanged text."
    rows = _once(
        (
            run.facts["recipe"],
            f"{run.facts['config']['masked_fraction']:.0%} of each batch",
            run.facts["data"]["masked_variant"],
            _replaced(run.facts["cache"].get("variant")),
            run.facts["data"]["positions"],
            run.facts["data"]["target"],
        )
        for run in masked
    )
    told = (
        "Before the model ran, tokens of a second copy of the text were replaced. A share of each batch comes from the "
        "replaced copy, at the positions named; the target is the row itself or its twin in the unchanged text."
    )
    return f"{told}\n\n{table(('recipe', 'share', 'variant', 'replaced', 'positions', 'target'), rows)}"


def _replaced(variant: dict[str, Any] | None) -> str:
    """How much of the text was replaced, and by what; runs of before that was written down do not say."""
    if variant is None:
        return "unknown"
    by = f"'{variant['mask_string']}'" if variant["mask_string"] else "random tokens"
    return f"{variant['mask_prob']:.3g} of the {'words' if variant['kind'] == 'mask_word' else 'tokens'} by {by}"


def _metrics(runs: Sequence[PushedRun]) -> list[str]:
    reported = all(run.report is not None for run in runs)
    names = [name for name in (METRICS if reported else _HELD_OUT) if any(_value(run, name, reported) for run in runs)]
    where = (
        "On clean held-out text, by granary's evaluate (`report.json`); names are SAEBench's where it has one. "
        "Columns ending in `_raw` are of the SAE as it is here; for the others its thresholds were moved to the L0 at "
        "which recipes are compared."
        if reported
        else "On held-out rows of the cache at the end of training; granary's evaluate has not measured all of them."
    )
    groups = _groups(runs)
    many = any(len(group) > 1 for _, group in groups)
    told = f"{where} {'Mean over seeds and its 95 % interval.' if many else 'One seed each, so no interval.'}"
    rows = [
        [*_kind(group[0]), note, len(group), *(_cell(group, name, reported) for name in names)]
        for note, group in groups
    ]
    head = ["architecture", "latents", "k", "recipe", "settings", "seeds", *names]
    if not any(row[4] for row in rows):
        head, rows = [*head[:4], *head[5:]], [[*row[:4], *row[5:]] for row in rows]
    return [told, table(head, rows)]


def _cell(group: Sequence[PushedRun], name: str, reported: bool) -> str:
    values = [value for run in group if (value := _value(run, name, reported)) is not None]
    if not values:
        return ""
    mean, low, high = interval(values)
    text = f"{mean:.4g}" if math.isnan(low) else f"{mean:.4g} ({low:.4g} to {high:.4g})"
    return text if len(values) == len(group) else f"{text}, {len(values)} of {len(group)} seeds"


def _value(run: PushedRun, name: str, reported: bool) -> float | None:
    if not reported:
        found = (run.facts.get("held_out") or {}).get(name)
    else:
        report = run.report or {}
        flat = {"l0": report.get("l0")}
        for numbers in report.get("metrics", {}).values():
            flat |= numbers
        found = flat.get(name)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _groups(runs: Sequence[PushedRun]) -> list[tuple[str, list[PushedRun]]]:
    """Runs that differ in their seed alone, each with what tells it from others of the same architecture and recipe."""
    apart: dict[str, list[PushedRun]] = {}
    for run in runs:
        apart.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    return [(_note(group[0], [other[0] for other in apart.values()]), group) for group in apart.values()]


def _note(run: PushedRun, others: Sequence[PushedRun]) -> str:
    settings = _settings(run)
    alike = [_settings(other) for other in others if _kind(other) == _kind(run)]
    varying = [name for name in settings if any(other.get(name) != settings[name] for other in alike)]
    return ", ".join(f"{name} {settings[name]}" for name in varying)


def _settings(run: PushedRun) -> dict[str, Any]:
    config = {name: value for name, value in run.facts["config"].items() if name not in ("name", "seed")}
    data = {f"data {name}": value for name, value in run.facts["data"].items()}
    return {**config, **data, "recipe": run.facts["recipe"], "cache": run.facts["cache"]["cache_id"]}


def _kind(run: PushedRun) -> list[object]:
    config = run.facts["config"]
    return [config["arch"], config["d_sae"], config["k"], run.facts["recipe"]]


def _tokens(run: PushedRun) -> int:
    return int(run.facts["tokens_seen"])


def _provenance(runs: Sequence[PushedRun]) -> str:
    made = _once((run.facts.get("git_commit", "unknown"), run.facts.get("versions") or {}) for run in runs)
    lines = [
        f"granary {plain(str(commit)[:12])}, {plain(', '.join(f'{k} {v}' for k, v in versions.items()))}"
        for commit, versions in made
    ]
    return "Made with " + "; ".join(lines) + ". Each folder's `run.json` has the whole recipe."


def _once(items: Iterable[Any]) -> list[Any]:
    """Each item once, in order, though it cannot be hashed."""
    kept: dict[str, Any] = {}
    for item in items:
        kept.setdefault(json.dumps(item, sort_keys=True), item)
    return list(kept.values())
