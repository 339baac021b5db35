"""What `python -m evaluate` does: find the runs, measure, compare, write the reports, say what they show."""

from pathlib import Path

from cache_spec.errors import UserError
from cache_spec.files import readable_json, write_file
from evaluate import wording
from evaluate.compare import differences, summaries, unreliable
from evaluate.measuring import REPORT, Measured, measure
from evaluate.names import Metric, available, find
from evaluate.page import render
from evaluate.report import overall_report
from evaluate.runs import find_runs
from train.reading import read_device

PAGE = "report.html"


def run(folder: Path, *, metrics: str, cache: Path | None, device: str, out: Path, seed: int) -> None:
    """Everything the command does. Raises UserError for what a user can mend."""
    chosen = choose_metrics(metrics)
    read_device(device)  # a wrong one is said before anything is read
    complete, unfinished = find_runs(folder)
    for name in unfinished:
        print(f"note: left out {name}, whose training is not finished (python -m train --resume finishes it)")
    measured = measure(complete, chosen, cache=cache, device=device, seed=seed)
    measured.missing.extend(f"{name}: its training is not finished" for name in unfinished)
    write_reports(measured, chosen, out)


def choose_metrics(text: str) -> list[Metric]:
    """Read `core,absorption`; empty means all. Raises UserError that lists the names that exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text.strip() and not names:
        raise UserError(f"--metrics '{text}' names nothing; there are {', '.join(available())}")
    return sorted(map(find, set(names or available())), key=lambda metric: (metric.name != "core", metric.name))


def write_reports(measured: Measured, metrics: list[Metric], out: Path) -> None:
    """Compare, write report.json and report.html over all runs to `out`, and print the table and the verdict."""
    columns = {name: column for metric in metrics for name, column in metric.columns.items()}
    tables = summaries(measured.results)
    compared = [name for name, column in columns.items() if column.short and column.better]
    changes = differences(measured.results, compared)
    faults = unreliable(measured.results, columns)
    report = overall_report(
        sentence=wording.sentence(changes),
        results=measured.results,
        tables=tables,
        differences=changes,
        unreliable=faults,
        columns=columns,
        missing=measured.missing,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / REPORT, readable_json(report))
    write_file(out / PAGE, render(measured, tables, changes, faults, columns).encode())
    print(f"\n{wording.terminal_table(tables, columns)}\n")
    for names, fault in wording.cautions(faults, columns):
        print(f"unreliable alone: {names} ({fault})")
    print(f"{wording.multiplicity(changes)}\n{wording.sentence(changes)}\n{(out / PAGE).resolve()}")
