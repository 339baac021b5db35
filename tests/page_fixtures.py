"""Planted results for the tests of the page: any grid of recipes, with numbers that depend on what they are."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evaluate.columns import Column
from evaluate.compare import Comparison, compare
from evaluate.example import Bar, Example
from evaluate.recipes import (
    DROPOUT,
    MATCHED,
    NOISE,
    ORACLE,
    PERMUTED,
    RANDOM,
    RANDOM_TOKEN,
    SMALL,
    Measured,
    Recipe,
    Result,
)

EVIL = "<script>alert('x')</script> & \"co\""


def _column(short: str, better: str, *, claim: bool = False, meaning: str = "") -> Column:
    return Column(
        meaning=meaning or f"what {short} means",
        short=short,
        better=better,
        claim=claim,
        terminal=short in ("L0", "EV"),
    )


COLUMNS: dict[str, Column] = {
    "l0": _column("L0", ""),
    "l0_raw": _column("raw L0", ""),
    "explained_variance": _column("EV", "higher", claim=True),
    "dead_latents": _column("dead", ""),
    "delta_ce": _column("ΔCE", "lower"),
    "ce_loss_score": _column("CE score", "higher"),
    "full_absorption_same_token": _column("absorption same", "lower", claim=True),
    "full_absorption_two_token": _column("absorption two", "lower", claim=True),
    "full_absorption_cross_token": _column("absorption cross", "lower", claim=True),
    "recall_gap_cross_token": _column("recall gap cross", "lower"),
    "first_letter_mean_full_absorption_score": _column("first-letter absorption", "lower", claim=True),
    "sae_top_1_test_auc": _column("AUC1", "higher", claim=True),
    "sae_top_1_test_auc_shifted": Column(meaning="AUC on shifted text", better="higher"),
    "sae_top_16_test_auc": _column("AUC16", "higher", claim=True),
    "sae_top_16_test_auc_shifted": Column(meaning="AUC on shifted text", better="higher"),
    "llm_test_auc": Column(meaning="AUC of a dense probe"),
    "llm_test_auc_shifted": Column(meaning="AUC of a dense probe on shifted text"),
    "ood_gap_to_dense_16": _column("gap to dense 16", "lower", claim=True),
    "ood_drop_16": _column("drop 16", "lower"),
    "jaccard_mean": _column("Jaccard", "lower", claim=True),
    "mcc": _column("MCC", "higher"),
    **{
        f"data_child_given_parent_{family}_{variant}": Column(meaning="P(child | parent) in the text")
        for family in ("same_token", "cross_token")
        for variant in ("clean", "masked", "kept")
    },
    "density_histogram": Column(meaning="latents by log10 firing rate"),
    "jaccard_histogram": Column(meaning="pairs by Jaccard index"),
}
_SHIFTS = {  # what a recipe does to absorption and explained variance
    "unmasked": (0.0, 0.0),
    "masked 0.25": (-0.01, -0.001),
    "masked 0.5": (-0.03, -0.004),
    "masked 1.0": (-0.10, -0.02),
    "gaussian (matched 0.5)": (-0.15, -0.03),
    "dropout (matched 0.5)": (-0.12, -0.02),
    "random token 0.5": (0.01, -0.01),
}
_CONTROLS = {"gaussian (matched 0.5)": NOISE, "dropout (matched 0.5)": DROPOUT, "random token 0.5": RANDOM_TOKEN}
EIGHT = (*_SHIFTS, "small")


def recipe(name: str, arch: str = "batchtopk", k: int = 6, *, bench: str = "tiny, resid_post.2") -> Recipe:
    """A recipe by its name; "small" is plain training of fewer latents."""
    found = Recipe(bench=bench, arch=arch, k=k, d_sae=512, name=name, is_plain=name == "unmasked")
    if name == "small":
        return replace(found, name="unmasked", d_sae=220, is_plain=True, control=SMALL)
    return replace(found, is_masked=name.startswith("masked"), control=_CONTROLS.get(name, ""))


def planted(
    names: Sequence[str] = ("unmasked", "masked 0.5"),
    archs: Sequence[str] = ("batchtopk",),
    ks: Sequence[int] = (6,),
    n_seeds: int = 3,
    *,
    controls: bool = True,
    without: Sequence[str] = (),
    logs: Path | None = None,
) -> Measured:
    """Results of the whole grid; `without`: beginnings of columns that were not measured; logs: where runs lie."""
    measured = Measured(missing=["columns of <something> are missing"], left_out={"run_7": "not finished; --resume"})
    for arch in archs:
        for k in ks:
            for seed in range(n_seeds):
                for name in names:
                    who = recipe(name, arch, k)
                    path = None if logs is None else write_log(logs, who, seed)
                    measured.results.append(result_of(who, seed, path=path))
                for kind in (RANDOM, MATCHED, PERMUTED) if controls else ():
                    who = replace(recipe(kind, arch, k), kind=kind, is_plain=False)
                    measured.results.append(result_of(who, seed))
    if controls:
        measured.results.append(
            result_of(Recipe(bench="tiny, resid_post.2", arch="", k=0, d_sae=463, name=ORACLE, kind=ORACLE), 0)
        )
    results = [
        replace(result, values={n: v for n, v in result.values.items() if not n.startswith(tuple(without))})
        for result in measured.results
    ]
    return replace(measured, results=results)


def result_of(who: Recipe, seed: int, path: Path | None = None) -> Result:
    """Numbers that depend on the recipe, its k and the seed; paired seeds share a part of their noise."""
    shared = np.random.default_rng([seed, who.k])
    rng = np.random.default_rng([seed, zlib.crc32(repr((who.arch, who.k, who.name, who.d_sae, who.kind)).encode())])
    absorbed, explained = _SHIFTS.get(who.name, (0.0, 0.0))
    quality = {RANDOM: 0.2, MATCHED: 0.3, PERMUTED: 0.35, ORACLE: 1.0}.get(
        who.kind, 0.8 + 0.02 * math.log(max(who.k, 1))
    )
    values = {"l0": who.k * (1 + 0.001 * rng.standard_normal()), "l0_raw": who.k * (1 + 0.05 * rng.random())}
    values |= {"dead_latents": float(rng.integers(0, 60)), "delta_ce": 0.1 * (1 - quality), "mcc": 0.6 * quality}
    common = 0.02 * shared.standard_normal()
    for name, column in COLUMNS.items():
        noise = common + 0.008 * rng.standard_normal()
        level = 0.4 - 0.06 * math.log(max(who.k, 1)) + absorbed
        values.setdefault(name, max(level + noise, 0.0) if column.better == "lower" else min(quality + noise, 1.0))
    values["explained_variance"] = (
        quality + 0.1 + explained + 0.002 * rng.standard_normal() - 2.0 * (who.kind == RANDOM)
    )
    values |= {"llm_test_auc": 0.97, "llm_test_auc_shifted": 0.87}
    if who.kind == ORACLE:
        values |= {name: 0.0 for name in values if "absorption" in name} | {"delta_ce": math.nan}
    rates = rng.poisson(30, 20).astype(float).tolist()
    pairs = (np.exp(-np.arange(33) / (4 + absorbed * 10)) / 5).tolist()
    return Result(
        run=f"{who.arch} {who.name} {who.k} {seed}",
        recipe=who,
        seed=seed,
        values={n: v for n, v in values.items() if not n.endswith("histogram")},
        profiles={"density_histogram": rates, "jaccard_histogram": pairs},
        example=example() if who.is_plain and seed == 0 and who.d_sae == 512 else None,
        path=path,
    )


def example() -> Example:
    """A worked example with a hostile name."""
    bars = tuple(
        Bar(
            child=f"lifelt <b> {i}",
            n=100 - i,
            firing=0.05 + 0.1 * i,
            absorbed=0.4,
            absorber=f"latent {i} (kind place, F1 0.15)",
        )
        for i in range(9)
    )
    return Example(family="two_token", parent="letter l", latents=(4, 9), bars=bars)


def write_log(folder: Path, who: Recipe, seed: int, n_lines: int = 120) -> Path:
    """A run's folder with a run.json and a log."""
    path = folder / f"{who.arch}_{who.name}_{who.k}_{who.d_sae}_{seed}".replace(" ", "_")
    path.mkdir(parents=True, exist_ok=True)
    facts = {
        "status": "complete",
        "cache": {
            "model": "tiny",
            "hook_point": "resid_post.2",
            "dataset": "embedded",
            "window_tokens": 64,
            "cache_id": "59",
        },
        "data": {"n_tokens": 500_000},
    }
    (path / "run.json").write_text(json.dumps(facts))
    rng = np.random.default_rng(seed)
    explained = _SHIFTS.get(who.name, (0.0, 0.0))[1]
    lines = []
    for i in range(1, n_lines + 1):
        rise = 1 - math.exp(-6 * i / n_lines)
        lines.append(
            {
                "step": 4 * i,
                "tokens": 4000 * i,
                "loss": 1 - 0.9 * rise + 0.01 * rng.standard_normal(),
                "explained_variance": 0.96 * rise + explained if i > 1 else None,
                "l0": who.k + 0.05 * rng.standard_normal(),
                "n_dead": int(20 * rise),
                "lr": 0.001,
            }
        )
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compared(measured: Measured, columns: Mapping[str, Column] = COLUMNS) -> Comparison:
    """What the command makes of the results."""
    return compare(measured.results, columns)
