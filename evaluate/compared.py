"""What was compared, as facts in words: the head of the report."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from evaluate.recipes import (
    CONTROLS,
    KINDS,
    MATCHED,
    ORACLE,
    PERMUTED,
    RANDOM,
    Measured,
    Recipe,
    Result,
    by_recipe,
)
from evaluate.scale import thousands
from evaluate.series import LEARNED, legend, looks
from evaluate.wording import number
from train.run_folder import read_facts

HOW_MATCHED = (
    "the threshold of an SAE that has one is set, on held-out clean text of its own, so that the mean number of "
    "latents on a clean token is the run's k; an SAE without a threshold (topk) stays as it is"
)
_DATA = "data_"
_PAIR_QUANTITIES = {
    "child_given_parent": "P(child | parent)",
    "parent_given_child": "P(parent | child)",
    "phi": "correlation",
}


def facts(measured: Measured) -> list[tuple[str, str]]:
    """(what, which), a line each."""
    results = measured.results
    learned = [recipe for recipe in by_recipe(results) if recipe.kind in LEARNED]
    benches = dict.fromkeys(recipe.bench for recipe in learned)
    found = [(_one_of(benches, "Model and place"), _bench(bench, results)) for bench in benches]
    names = [look.label for look in legend(looks(learned))]
    found += [
        ("Recipes", "; ".join(names)),
        ("Architectures", ", ".join(dict.fromkeys(recipe.arch for recipe in learned))),
        ("Latents on per token, k", _numbers(recipe.k for recipe in learned)),
        ("Latents, d_sae", _numbers(recipe.d_sae for recipe in learned)),
        ("Seeds", _seeds(results)),
        ("L0", f"matched: {HOW_MATCHED}"),
    ]
    here, absent = controls(results)
    found.append(("Controls here", "; ".join(here) or "none"))
    found += [("Controls absent", "; ".join(absent))] if absent else []
    return [(term, text) for term, text in found if text]


def controls(results: Iterable[Result]) -> tuple[list[str], list[str]]:
    """The controls that stand in the report, and those that do not."""
    recipes = [result.recipe for result in results]
    has = {recipe.control for recipe in recipes} | {recipe.kind for recipe in recipes}
    known = (ORACLE, *(kind for kind in KINDS if kind in (MATCHED, PERMUTED, RANDOM)), *CONTROLS)
    return [name for name in known if name in has], [name for name in known if name not in has]


def _one_of(benches: Sequence[str] | dict[str, None], text: str) -> str:
    return text if len(benches) == 1 else f"{text}, one of {len(benches)}"


def _bench(bench: str, results: Sequence[Result]) -> str:
    """Model, hook point, cache and training text of one bench, from the run.json of its first run."""
    path = next((r.path for r in results if r.recipe.bench == bench and r.path is not None), None)
    run = read_facts(path) if path is not None else None
    cache, data = _part(run, "cache"), _part(run, "data")
    words = [
        ("model {}", cache.get("model")),
        ("hook point {}", cache.get("hook_point")),
        ("text {}", cache.get("dataset")),
        ("windows of {} tokens", cache.get("window_tokens")),
        ("cache {}", cache.get("cache_id")),
        ("each run trained on {} tokens", thousands(data["n_tokens"]) if data.get("n_tokens") else None),
    ]
    return ", ".join(text.format(value) for text, value in words if value) or bench


def _part(run: dict[str, Any] | None, name: str) -> dict[str, Any]:
    part = (run or {}).get(name)
    return part if isinstance(part, dict) else {}


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(set(values)))


def _seeds(results: Sequence[Result]) -> str:
    """`5 of each recipe: 0, 1, 2, 3, 4`, or how their number varies."""
    by_recipe: dict[Recipe, set[int]] = {}
    for result in results:
        if result.recipe.kind in LEARNED:
            by_recipe.setdefault(result.recipe, set()).add(result.seed)
    counts = sorted({len(seeds) for seeds in by_recipe.values()})
    if not counts:
        return ""
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{many} of each recipe: {', '.join(map(str, sorted(set().union(*by_recipe.values()))))}"


def data_pairs(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """How parents and children go together in the text: (family and quantity, clean, masked, kept tokens, change).

    From the columns data_{quantity}_{family}_{variant}, which are the same for every run of a cache.
    """
    rows = []
    for bench in dict.fromkeys(result.recipe.bench for result in results):
        values = next(
            (r.values for r in results if r.recipe.bench == bench and any(n.startswith(_DATA) for n in r.values)), {}
        )
        for quantity, words in _PAIR_QUANTITIES.items():
            start = f"{_DATA}{quantity}_"
            families = [n.removeprefix(start).removesuffix("_clean") for n in values if n.startswith(start)]
            for family in (name for name in families if f"{start}{name}_masked" in values):
                clean, masked = values[f"{start}{family}_clean"], values[f"{start}{family}_masked"]
                kept = values.get(f"{start}{family}_kept", math.nan)
                label = f"{family.replace('_', ' ')}: {words}"
                cells = number(clean), number(masked), number(kept), number(masked - clean, signed=True)
                rows.append((label, *cells))
    return rows
