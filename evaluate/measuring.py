"""Measure runs, controls and pretrained SAEs, one after another, and keep the numbers of each once they are there.

What was kept by the same code from the same data is taken instead of measured, so an interrupted evaluation goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_spec import ActivationCache, CacheError, HookPlan, UserError
from cache_spec.copies import Copies
from cache_spec.errors import StoreError
from cache_spec.progress import Progress
from cache_spec.remote import open_cache
from cache_spec.untrusted import printable
from evaluate.bench import make_bench
from evaluate.cases import Case, Place, check_run, control_cases, run_cases
from evaluate.controls import mean_l0
from evaluate.example import recall_example
from evaluate.kept import fingerprint, keep, read_kept
from evaluate.metrics.first_letter import guard
from evaluate.names import Metric
from evaluate.pretrained import Pretrained, find_pretrained, hook_of, pretrained_case
from evaluate.recipes import PRETRAINED, TRAINED, Measured
from evaluate.report import case_report, measurement, result_of
from evaluate.runs import Run, RunsIncomplete, open_caches, reasons, without_twins
from evaluate.store import Store
from evaluate.subject import Bench
from evaluate.text_sources import TextSources

HIDDEN = ".evaluate"  # in the report's folder: activations of evaluation text, and the numbers of controls
STABILITY = "stability"
_FIELDS = {  # what a metric may need of the bench, in words
    "language": "text with ground truth, which the embedded model alone has",
    "masked_language": "text with ground truth and a masked variant",
    "tasks": "labelled text (--probe-data, --sae-probes)",
    "masked": "a masked variant in the cache",
    "splice": "the model that the cache was made with",
    "spelling": "a model and tokenizer that can be asked to spell",
    "shifted": "text of another distribution (--shifted-text)",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure and how. out: the report's folder. fresh: measure also what was measured before."""

    metrics: Sequence[Metric]
    device: str
    seed: int
    out: Path
    sources: TextSources = field(default_factory=TextSources)
    fresh: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """What is measured on one hook point of one cache. hashes: folder of a run -> name -> SHA-256 of its files."""

    cache: ActivationCache
    hook: HookPlan
    runs: list[Run] = field(default_factory=list)
    pretrained: list[Pretrained] = field(default_factory=list)
    hashes: dict[Path, Mapping[str, str]] = field(default_factory=dict)


def measure(
    runs: Sequence[Run],
    asked: Asked,
    *,
    cache: str | Path | None = None,
    copies: Copies | None = None,
    saes: Sequence[str] = (),
    hook: str = "",
    left_out: Mapping[str, str] | None = None,
) -> Measured:
    """Measure all runs with the controls that fit them, and SAEs of others (`saes`: folders or hub ids).

    Runs of one cache and hook point share one bench. Each case's report is written as soon as it is measured. What
    cannot be measured is in `left_out`, beside what was left out before; raises RunsIncomplete if that is everything.
    """
    why_left_out = dict(left_out or {})
    groups = _groups(runs, cache, copies, saes, hook, why_left_out)
    order_varies = _order_varies([run for group in groups for run in group.runs])
    measured = Measured(left_out=why_left_out, order_varies=order_varies)
    if not groups:
        raise RunsIncomplete(f"nothing can be measured; {reasons(measured.left_out)}")
    several = len({group.cache.plan.cache_id for group in groups}) > 1
    for group in groups:
        try:
            bench = _bench(group, asked)
        except (CacheError, StoreError) as error:
            names = [run.path.name for run in group.runs] + [sae.name for sae in group.pretrained]
            measured.left_out.update(dict.fromkeys(names, str(error)))
        else:
            _measure_group(group, bench, asked, measured, several_caches=several)
    if not measured.results:
        raise RunsIncomplete(f"nothing can be measured; {reasons(measured.left_out)}")
    return measured


def _groups(
    runs: Sequence[Run],
    cache: str | Path | None,
    copies: Copies | None,
    saes: Sequence[str],
    hook: str,
    left_out: dict[str, str],
) -> list[_Group]:
    """Runs and SAEs that can be read, by cache and hook point; why the others cannot goes into `left_out`."""
    groups: dict[tuple[str, str], _Group] = {}
    caches = open_caches(runs, cache, left_out, copies)

    def group_of(opened: ActivationCache, plan: HookPlan) -> _Group:
        return groups.setdefault((opened.plan.cache_id, plan.name), _Group(cache=opened, hook=plan))

    hashes = {}
    for run in runs:
        if run.cache_id not in caches:
            continue
        try:
            hashes[run.path] = check_run(run, caches[run.cache_id].hook(run.hook))
        except UserError as error:
            left_out[run.path.name] = str(error)
    for run in without_twins((run for run in runs if run.path in hashes), left_out):
        opened = caches[run.cache_id]
        group = group_of(opened, opened.hook(run.hook))
        group.runs.append(run)
        group.hashes[run.path] = hashes[run.path]
    for text in saes:
        try:
            opened = _cache_for_saes(caches, cache, copies)
            pretrained = find_pretrained(text)
            group_of(opened, hook_of(pretrained, opened, hook)).pretrained.append(pretrained)
        except UserError as error:
            left_out[text] = str(error)
    return list(groups.values())


def _cache_for_saes(
    caches: Mapping[str, ActivationCache], given: str | Path | None, copies: Copies | None
) -> ActivationCache:
    """The given cache, or the one that all runs share."""
    if given is not None:
        return open_cache(given, copies, allow_partial=True)
    if len(caches) != 1:
        raise UserError("--sae needs the activations to measure it on; say which cache with --cache")
    return next(iter(caches.values()))


def _bench(group: _Group, asked: Asked) -> Bench:
    return make_bench(
        group.cache,
        group.hook,
        device=asked.device,
        seed=asked.seed,
        wanted={name for metric in asked.metrics for name in (*metric.needs, *metric.wants)},
        store=Store(asked.out / HIDDEN),
        sources=asked.sources,
    )


def _measure_group(group: _Group, bench: Bench, asked: Asked, measured: Measured, *, several_caches: bool) -> None:
    name = f"{group.cache.plan.model.get('id')}, {group.hook.hook_point}"
    if several_caches:
        name += f", cache {group.cache.plan.cache_id}"
    place = Place(
        bench=bench,
        name=name,
        device=asked.device,
        seed=asked.seed,
        controls=asked.out / HIDDEN / "controls",
        with_peers=any(metric.name == STABILITY for metric in asked.metrics),
    )
    cases = [
        *run_cases(group.runs, group.hashes, place),
        *control_cases(group.runs, group.hashes, place),
        *(pretrained_case(pretrained, place, asked.out) for pretrained in group.pretrained),
    ]
    usable, lacking = _usable(asked.metrics, bench)
    missing = [*bench.missing, *lacking]
    if place.with_peers and len({(run.kind, run.recipe, run.d_sae) for run in group.runs}) == len(group.runs):
        missing.append(f"{STABILITY} is not measured: it compares seeds of one recipe, and no recipe has two")
    for sentence in missing:
        if sentence not in measured.missing:
            print(printable(f"note: {sentence}"))
            measured.missing.append(sentence)
    if any(metric.name == "first_letter" for metric in usable):
        widths = sorted({case.recipe.d_sae for case in cases if case.recipe.kind in (TRAINED, PRETRAINED)})
        measured.cautions.extend(filter(None, (guard(bench.model.n_parameters, d_sae) for d_sae in widths)))
    _measure_cases(cases, usable, missing, bench, asked, measured)


def _order_varies(runs: Sequence[Run]) -> bool:
    """Whether the seeds of every recipe that has several are seeds of the rows' order too."""
    orders: dict[tuple, list[int]] = {}
    for run in runs:
        orders.setdefault((run.kind, run.recipe, run.d_sae), []).append(run.data_seed)
    several = [seeds for seeds in orders.values() if len(seeds) > 1]
    return bool(several) and all(len(set(seeds)) == len(seeds) for seeds in several)


def _usable(metrics: Sequence[Metric], bench: Bench) -> tuple[list[Metric], list[str]]:
    """The metrics that this bench has all for, and a sentence on each of the others."""
    usable, lacking = [], []
    for metric in metrics:
        absent = [name for name in metric.needs if _is_absent(getattr(bench, name))]
        if absent:
            words = " and ".join(_FIELDS.get(name, name) for name in absent)
            lacking.append(f"{metric.name} is not measured: it needs {words}")
        else:
            usable.append(metric)
    return usable, lacking


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, tuple) and not value)


def _measure_cases(
    cases: Sequence[Case],
    metrics: Sequence[Metric],
    missing: Sequence[str],
    bench: Bench,
    asked: Asked,
    measured: Measured,
) -> None:
    shared = {"bench": bench.facts, "missing": list(missing)}
    names = [metric.name for metric in metrics]
    marks = [
        fingerprint({**shared, "case": case.facts}, device=asked.device, metrics=names, seed=asked.seed)
        for case in cases
    ]
    kept = [None if asked.fresh else read_kept(case.report, mark) for case, mark in zip(cases, marks, strict=True)]
    if n_kept := sum(report is not None for report in kept):
        print(f"{n_kept} of {len(cases)} were measured before by this same code; taken from their report.json")
    unwritable: dict[str, list[str]] = {}
    with Progress("evaluate", len(cases), "SAEs") as progress:
        for case, mark, report in zip(cases, marks, kept, strict=True):
            found = report or _measure_case(case, metrics, missing)
            measured.results.append(result_of(case, found))
            # Also what was kept: other runs in the folder may have changed what its recipe is called.
            if why := keep(case.report, case_report(case, found, mark)):
                unwritable.setdefault(why, []).append(str(case.report.parent))
            progress.advance(note=case.name)
    for why, folders in unwritable.items():
        named = ", ".join(dict.fromkeys(folders))
        print(printable(f"note: {named} cannot be written to ({why}), so it is measured again"))


def _measure_case(case: Case, metrics: Sequence[Metric], missing: Sequence[str]) -> dict[str, Any]:
    subject = case.make()
    by_metric = {metric.name: metric.measure(subject) for metric in metrics}
    l0 = by_metric.get("core", {}).get("l0")
    if not isinstance(l0, float):
        l0 = mean_l0(subject.dictionary, subject.held_out)
    example = recall_example(subject) if case.with_example and by_metric.get("absorption") else None
    return measurement(subject, by_metric, l0, example, missing)
