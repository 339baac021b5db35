"""report.json: beside each run, and over all runs. Names are SAEBench's where it has the same quantity."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluate.cases import Case
from evaluate.columns import Column
from evaluate.compare import Comparison, Difference
from evaluate.example import Example, example_of
from evaluate.names import Measurements
from evaluate.recipes import Measured, Recipe, Result
from evaluate.saebench.names import nested
from evaluate.statistics import Estimate
from evaluate.subject import Learned, Subject

REPORT_VERSION = "2.1"  # 2.1: the report of an SAE ends with its checksum


def measurement(
    subject: Subject, by_metric: Mapping[str, Measurements], l0: float, example: Example | None, missing: Sequence[str]
) -> dict[str, Any]:
    """What was measured of one case, as JSON: thresholds, every number and histogram, and SAEBench's nesting.

    Numbers that are not finite are null, in histograms too.
    """
    numbers = {
        metric: {name: _number(value) for name, value in values.items() if not isinstance(value, list)}
        for metric, values in by_metric.items()
    }
    profiles = {
        name: [_number(value) for value in values]
        for found in by_metric.values()
        for name, values in found.items()
        if isinstance(values, list)
    }
    return {
        "threshold": {"trained": _threshold(subject.raw), "matched": _threshold(subject.dictionary)},
        "n_rows": {"calibration": subject.bench.calibration.n, "scored": subject.held_out.n},
        "l0": l0,
        "metrics": numbers,
        "profiles": profiles,
        "example": None if example is None else asdict(example),
        "eval_result_metrics": nested(numbers),
        "missing": list(missing),
    }


def case_report(case: Case, measured: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """The report of one case: who it is, what was measured, and what that was measured with."""
    facts = {} if case.run is None else {"cache_id": case.run.cache_id, "hook": case.run.hook}
    return {
        "report_version": REPORT_VERSION,
        "run": case.name,
        **_recipe(case.recipe),
        "seed": case.seed,
        **facts,
        **measured,
        "fingerprint": fingerprint,
    }


def result_of(case: Case, measured: Mapping[str, Any]) -> Result:
    """The numbers of a case from its measurement as JSON, new or read again: floats come back as they were."""
    values = {"l0": measured["l0"]}
    for numbers in measured["metrics"].values():
        values |= numbers
    return Result(
        run=case.name,
        recipe=case.recipe,
        seed=case.seed,
        values={name: _float(value) for name, value in values.items()},
        profiles={name: [_float(value) for value in profile] for name, profile in measured["profiles"].items()},
        example=None if measured["example"] is None else example_of(measured["example"]),
        path=None if case.run is None else case.run.path,
    )


def _threshold(dictionary: object) -> float | None:
    """The mean threshold of an SAE's latents; None where there is none, or it overflows."""
    if not isinstance(dictionary, Learned) or dictionary.sae.threshold is None:
        return None
    return _number(float(dictionary.sae.threshold.mean()))


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def overall_report(
    *, sentence: str, measured: Measured, comparison: Comparison, columns: Mapping[str, Column], folder: Path
) -> dict[str, Any]:
    """The report over all runs; paths of runs are relative to `folder`."""
    return {
        "report_version": REPORT_VERSION,
        "sentence": sentence,
        "families": dict(comparison.families),
        "n_comparisons": sum(comparison.families.values()),
        "cautions": list(comparison.cautions),
        "missing": list(measured.missing),
        "left_out": dict(sorted(measured.left_out.items())),
        "unreliable": dict(comparison.unreliable),
        "recipes": [{**_recipe(recipe), "metrics": _estimates(table)} for recipe, table in comparison.tables.items()],
        "pairs": [
            {**_recipe(recipe), "baseline": _recipe(baseline), "power_note": note}
            for (recipe, baseline), note in comparison.power_notes.items()
        ],
        "differences": [_difference(difference) for difference in comparison.differences],
        "pooled": [_difference(difference) for difference in comparison.pooled],
        "runs": [
            {
                **_recipe(result.recipe),
                "run": result.run,
                "seed": result.seed,
                "path": None if result.path is None else _relative(result.path, folder),
                "metrics": {name: _number(value) for name, value in result.values.items()},
                "profiles": {name: [_number(value) for value in profile] for name, profile in result.profiles.items()},
            }
            for result in measured.results
        ],
        "columns": {
            name: {
                "meaning": column.meaning,
                "better": column.better,
                "claim": column.claim,
                "reliable": column.reliable,
            }
            for name, column in columns.items()
        },
    }


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "bench": recipe.bench,
        "kind": recipe.kind,
        "arch": recipe.arch,
        "k": recipe.k,
        "d_sae": recipe.d_sae,
        "recipe": recipe.name,
        "control": recipe.control,
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
        "family": difference.family,
        "mean": _number(difference.mean),
        "standard_error": _number(difference.error),
        "interval_95": [_number(difference.low), _number(difference.high)],
        "n_pairs": difference.n,
        "n_seeds": difference.n_seeds,
        "n_pooled": difference.n_pooled,
        "p": _number(difference.p),
        "p_holm": _number(difference.p_holm),
        "n_family": difference.n_family,
        "seeds_needed": difference.seeds_needed,
        "l0_change": _number(difference.l0_change),
        "l0_matched": difference.l0_matched,
        "verdict": difference.verdict,
    }
