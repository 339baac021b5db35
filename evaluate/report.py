"""report.json: beside each run, and over all runs. Names are SAEBench's where it has the same quantity."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.columns import Column
from evaluate.compare import Difference, Estimate, Recipe, Result
from evaluate.runs import Run
from evaluate.subject import Learned, Subject

REPORT_VERSION = "1.0"
# SAEBench's core report: section -> our columns of the same name and meaning
_SAEBENCH_CORE = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_ratio",),
    "sparsity": ("l0",),
    "misc_metrics": ("frac_alive",),
}


def run_report(run: Run, subject: Subject, by_metric: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The report of one run: recipe, thresholds, every number by metric, and SAEBench's nesting of the core ones."""
    core = by_metric.get("core", {})
    nested = {
        section: {name: _number(core[name]) for name in names if name in core}
        for section, names in _SAEBENCH_CORE.items()
    }
    return {
        "report_version": REPORT_VERSION,
        "run": run.name,
        "recipe": run.recipe,
        "arch": run.arch,
        "k": run.k,
        "d_sae": run.d_sae,
        "seed": run.seed,
        "settings": run.settings,
        "cache_id": run.cache_id,
        "hook": run.hook,
        "threshold": {"trained": _threshold(subject.raw), "matched": _threshold(subject.dictionary)},
        "n_rows": {"calibration": subject.bench.calibration.n, "scored": subject.held_out.n},
        "metrics": {
            metric: {name: _number(value) for name, value in values.items()} for metric, values in by_metric.items()
        },
        "eval_result_metrics": {section: values for section, values in nested.items() if values},
        "missing": list(subject.bench.missing),
    }


def _threshold(dictionary: object) -> float | None:
    """The mean threshold of an SAE's latents; None where there is none."""
    if not isinstance(dictionary, Learned) or dictionary.sae.threshold is None:
        return None
    return float(dictionary.sae.threshold.mean())


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def overall_report(
    *,
    sentence: str,
    results: Sequence[Result],
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    differences: Sequence[Difference],
    unreliable: Mapping[str, str],
    columns: Mapping[str, Column],
    missing: Sequence[str],
) -> dict[str, Any]:
    """The report over all runs."""
    return {
        "report_version": REPORT_VERSION,
        "sentence": sentence,
        "n_comparisons": len(differences),
        "missing": list(missing),
        "unreliable": dict(unreliable),
        "recipes": [{**_recipe(recipe), "metrics": _estimates(table)} for recipe, table in tables.items()],
        "differences": [_difference(difference) for difference in differences],
        "runs": [
            {
                **_recipe(result.recipe),
                "run": result.run,
                "seed": result.seed,
                "metrics": {name: _number(value) for name, value in result.values.items()},
            }
            for result in results
        ],
        "columns": {name: {"meaning": column.meaning, "better": column.better} for name, column in columns.items()},
    }


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "bench": recipe.bench,
        "kind": recipe.kind,
        "arch": recipe.arch,
        "k": recipe.k,
        "d_sae": recipe.d_sae,
        "recipe": recipe.name,
        "settings": recipe.settings,
    }


def _estimates(table: Mapping[str, Estimate]) -> dict[str, Any]:
    return {
        name: {"mean": _number(estimate.mean), "standard_error": _number(estimate.error), "n_seeds": estimate.n}
        for name, estimate in table.items()
    }


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        **_recipe(difference.recipe),
        "baseline": _recipe(difference.baseline),
        "column": difference.column,
        "mean": _number(difference.mean),
        "interval_95": [_number(difference.low), _number(difference.high)],
        "n_pairs": difference.n,
        "l0_change": _number(difference.l0_change),
        "p": _number(difference.p),
        "significant_after_holm": difference.holm,
        "verdict": difference.verdict,
    }
