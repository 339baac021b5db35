"""Measure runs and controls, one after another, and leave each run's report beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cache_spec.files import readable_json, write_file
from cache_spec.progress import Progress
from evaluate.bench import make_bench
from evaluate.compare import ORACLE, RANDOM, Recipe, Result
from evaluate.controls import oracle_subject, subject_of_sae, untrained_sae
from evaluate.example import Example, recall_example
from evaluate.names import Metric
from evaluate.report import run_report
from evaluate.runs import Run, open_cache
from evaluate.subject import Bench, Subject, chunks
from train.run_folder import load_run

REPORT = "report.json"
DENSITY_BINS = np.arange(-5.0, 0.01, 0.25)  # edges, log10 of the share of tokens that a latent fires on


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Everything that was measured: what the report is made of.

    densities: per recipe, the mean over seeds of the number of latents in each bin of log10 firing rate.
    missing: sentences on what could not be measured, and why.
    """

    results: list[Result] = field(default_factory=list)
    densities: dict[Recipe, list[np.ndarray]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """One dictionary to measure; made when its turn comes. `run` is None for a control."""

    name: str
    recipe: Recipe
    seed: int
    make: Callable[[], Subject]
    run: Run | None = None


def measure(runs: Sequence[Run], metrics: Sequence[Metric], *, cache: Path | None, device: str, seed: int) -> Measured:
    """Measure all runs with the controls that fit them; runs of one cache and hook point share one bench.

    Each run's report.json is written as soon as it is measured.
    """
    measured = Measured()
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.cache_id, run.hook), []).append(run)
    for group in groups.values():
        opened = open_cache(group[0], cache)
        hook = opened.hook(group[0].hook)
        bench = make_bench(
            opened,
            hook,
            device=device,
            seed=seed,
            with_model=any(metric.name == "core" for metric in metrics),
            with_language=any(metric.needs_language for metric in metrics),
        )
        measured.missing.extend(bench.missing)
        for sentence in bench.missing:
            print(f"note: {sentence}")
        name = f"{opened.plan.model.get('id')}, {hook.hook_point}"
        if len({run.cache_id for run in runs}) > 1:
            name += f", cache {group[0].cache_id}"
        _measure_cases(list(_cases(group, bench, name, device)), metrics, bench, measured)
    return measured


def _cases(runs: list[Run], bench: Bench, bench_name: str, device: str) -> Iterator[_Case]:
    """The runs, plain ones first, then an untrained SAE of each kind, then the oracle."""
    for run in sorted(runs, key=lambda run: (run.arch, run.k, run.settings, -run.d_sae, not run.is_plain, run.name)):

        def trained(run: Run = run) -> Subject:
            return subject_of_sae(run.name, load_run(run.path, device).sae, run.k, bench)

        yield _Case(name=run.name, recipe=_recipe(run, bench_name), seed=run.seed, make=trained, run=run)
    for run in _first_of_each_kind(runs):

        def untrained(run: Run = run) -> Subject:
            return subject_of_sae(RANDOM, untrained_sae(run, bench.calibration), run.k, bench)

        recipe = replace(_recipe(run, bench_name), name=RANDOM, kind=RANDOM, is_plain=False, is_masked=False)
        yield _Case(name=f"{RANDOM} {run.arch}", recipe=recipe, seed=run.seed, make=untrained)
    if bench.language is not None:
        d_sae = len(bench.language.feature_names)
        recipe = Recipe(bench=bench_name, arch="", k=0, d_sae=d_sae, name=ORACLE, kind=ORACLE)
        yield _Case(name=ORACLE, recipe=recipe, seed=0, make=lambda: oracle_subject(bench))


def _recipe(run: Run, bench_name: str) -> Recipe:
    return Recipe(
        bench=bench_name,
        arch=run.arch,
        k=run.k,
        d_sae=run.d_sae,
        name=run.recipe,
        is_plain=run.is_plain,
        is_masked=run.is_masked,
        settings=run.settings,
    )


def _first_of_each_kind(runs: list[Run]) -> list[Run]:
    """One run per architecture, k and settings, the largest: the ones an untrained SAE stands beside."""
    kinds: dict[tuple[str, int, str], Run] = {}
    for run in sorted(runs, key=lambda run: (-run.d_sae, run.seed)):
        kinds.setdefault((run.arch, run.k, run.settings), run)
    return list(kinds.values())


def _measure_cases(cases: list[_Case], metrics: Sequence[Metric], bench: Bench, measured: Measured) -> None:
    usable = [metric for metric in metrics if bench.language is not None or not metric.needs_language]
    with Progress("evaluate", len(cases), "SAEs") as progress:
        for case in cases:
            subject = case.make()
            by_metric = {metric.name: metric.measure(subject) for metric in usable}
            values = {name: value for numbers in by_metric.values() for name, value in numbers.items()}
            measured.results.append(Result(run=case.name, recipe=case.recipe, seed=case.seed, values=values))
            measured.densities.setdefault(case.recipe, []).append(density(subject))
            if case.run is not None:
                report = run_report(case.run, subject, by_metric)
                write_file(case.run.path / REPORT, readable_json(report))
            if by_metric.get("absorption") and case.recipe.is_plain and not measured.examples:
                measured.examples.append(recall_example(subject, case.recipe, case.seed))
            progress.advance(note=case.name)


def density(subject: Subject) -> np.ndarray:
    """Latents in each bin of log10 firing rate on the clean held-out rows, [n_bins]; dead ones are in none."""
    n_firing = torch.stack([(subject.dictionary.encode(rows) != 0).sum(0) for rows in chunks(subject.held_out)]).sum(0)
    rate = n_firing.double().cpu().numpy() / subject.held_out.n
    return np.histogram(np.log10(rate[rate > 0]), DENSITY_BINS)[0]
