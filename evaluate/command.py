"""What `python -m evaluate` does: find the runs, measure, compare, write the reports, say what they show."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cache_spec.copies import Copies
from cache_spec.errors import UserError
from cache_spec.files import readable_json, remove_stale_partials_of, write_file
from cache_spec.untrusted import printable
from evaluate import wording
from evaluate.cases import REPORT
from evaluate.columns import Column
from evaluate.compare import compare
from evaluate.measuring import Asked, measure
from evaluate.names import Metric, available, find
from evaluate.page import render
from evaluate.recipes import Measured
from evaluate.report import overall_report
from evaluate.runs import RunsIncomplete, find_runs, reasons
from evaluate.text_sources import TextSources
from train.reading import read_device
from train.run_folder import FACTS

PAGE = "report.html"


def run(
    folder: Path | None,
    *,
    out: Path,
    metrics: str = "",
    saes: Sequence[str] = (),
    cache: str | Path | None = None,
    copies: Copies | None = None,
    hook: str = "",
    sources: TextSources | None = None,
    device: str = "cpu",
    seed: int = 0,
    fresh: bool = False,
) -> None:
    """Everything the command does. Raises UserError for what a user can mend."""
    chosen = choose_metrics(metrics)
    read_device(device)  # a wrong one is said before anything is read
    check_folder(out)
    if folder is None and not saes:
        raise UserError("there is nothing to measure; give the folder of runs, or SAEs with --sae")
    if hook and not saes:
        raise UserError("--hook is for --sae; runs say their own hook point, so leave it out")
    complete, left_out = find_runs(folder) if folder else ([], {})
    asked = Asked(metrics=chosen, device=device, seed=seed, out=out, sources=sources or TextSources(), fresh=fresh)
    measured = measure(complete, asked, cache=cache, copies=copies, saes=saes, hook=hook, left_out=left_out)
    for name, why in measured.left_out.items():
        print(printable(f"note: left out {name}: {why}"))
    alone = (out / FACTS).is_file()
    write_reports(measured, chosen, out, with_json=not alone)
    if alone:
        print(f"{out} is one run: its {REPORT} is its own, and there is none over all runs")
    if measured.left_out:
        n_runs = len(complete) + len(left_out) + len(saes)
        raise RunsIncomplete(
            f"{len(measured.left_out)} of {n_runs} SAEs are not in the report; {reasons(measured.left_out)}"
        )


def check_folder(out: Path) -> None:
    """Raises UserError if no folder can be made or written to at `out`, before minutes of measuring."""
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out} cannot be a folder: {existing} is a file; give another place")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--out {out} cannot be written to; name another folder with --out")


def choose_metrics(text: str) -> list[Metric]:
    """Read `core,absorption`; empty means all. Raises UserError that lists the names that exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text.strip() and not names:
        raise UserError(f"--metrics '{text}' names nothing; there are {', '.join(available())}")
    return sorted(map(find, set(names or available())), key=lambda metric: (metric.name != "core", metric.name))


def columns_of(metrics: Sequence[Metric]) -> dict[str, Column]:
    """The columns of the chosen metrics, and L0, which is always measured: what is compared has to agree in it."""
    chosen = {name: column for metric in metrics for name, column in metric.columns.items()}
    return {"l0": find("core").columns["l0"], **chosen}


def write_reports(measured: Measured, metrics: Sequence[Metric], out: Path, *, with_json: bool = True) -> None:
    """Compare, write report.json and report.html over all runs to `out`, and print the table and the verdict.

    with_json: False where `out` is a run, whose own report.json must stay.
    """
    columns = columns_of(metrics)
    comparison = compare(measured.results, columns)
    comparison = replace(comparison, cautions=[*measured.cautions, *comparison.cautions])
    sentence = wording.sentence(comparison, columns)
    report = overall_report(sentence=sentence, measured=measured, comparison=comparison, columns=columns, folder=out)
    out.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, PAGE):
        remove_stale_partials_of(out / name)
    if with_json:
        write_file(out / REPORT, readable_json(report))
    write_file(out / PAGE, render(measured, comparison, columns).encode())
    print(f"\n{wording.terminal_table(comparison, columns)}\n")
    faults = wording.faults(comparison.unreliable, columns)
    lines = [
        *wording.verdict_lines(comparison, columns),
        *(f"unreliable here: {names} ({fault})" for names, fault in faults),
        *(f"caution: {caution}" for caution in comparison.cautions),
        *wording.multiplicity(comparison),
        sentence,
        str((out / PAGE).resolve()),
    ]
    print(printable("\n".join(lines)))
