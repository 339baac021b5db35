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
from evaluate.runs import RUN_FILE, RunsIncomplete, find_runs, reasons
from train.reading import read_device

PAGE = "report.html"


def run(folder: Path, *, metrics: str, cache: Path | None, device: str, out: Path, seed: int) -> None:
    """Everything the command does. Raises UserError for what a user can mend."""
    chosen = choose_metrics(metrics)
    read_device(device)  # a wrong one is said before anything is read
    check_folder(out)
    complete, left_out = find_runs(folder)
    for name, why in left_out.items():
        print(f"note: left out {name}: {why}")
    measured = measure(complete, chosen, cache=cache, device=device, seed=seed)
    measured.missing.extend(f"{name}: {why}" for name, why in left_out.items())
    alone = (folder / RUN_FILE).is_file() and out.resolve() == folder.resolve()
    write_reports(measured, chosen, out, with_json=not alone)
    if alone:
        print(f"{folder} is one run: its {REPORT} is its own, and there is none over all runs")
    if left_out:
        raise RunsIncomplete(
            f"{len(left_out)} of {len(complete) + len(left_out)} runs in {folder} are not in the report; "
            f"{reasons(left_out)}"
        )


def check_folder(out: Path) -> None:
    """Raises UserError if no folder can be made at `out`, before minutes of measuring."""
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out} cannot be a folder: {existing} is a file; give another place")


def choose_metrics(text: str) -> list[Metric]:
    """Read `core,absorption`; empty means all. Raises UserError that lists the names that exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text.strip() and not names:
        raise UserError(f"--metrics '{text}' names nothing; there are {', '.join(available())}")
    return sorted(map(find, set(names or available())), key=lambda metric: (metric.name != "core", metric.name))


def write_reports(measured: Measured, metrics: list[Metric], out: Path, *, with_json: bool = True) -> None:
    """Compare, write report.json and report.html over all runs to `out`, and print the table and the verdict.

    with_json: False where `out` is a run, whose own report.json must stay.
    """
    columns = {name: column for metric in metrics for name, column in metric.columns.items()}
    tables = summaries(measured.results)
    compared = [name for name, column in columns.items() if column.short and column.better]
    changes = differences(measured.results, compared)
    faults = unreliable(measured.results, columns)
    report = overall_report(
        sentence=wording.sentence(changes, faults),
        results=measured.results,
        tables=tables,
        differences=changes,
        unreliable=faults,
        columns=columns,
        missing=measured.missing,
    )
    out.mkdir(parents=True, exist_ok=True)
    if with_json:
        write_file(out / REPORT, readable_json(report))
    write_file(out / PAGE, render(measured, tables, changes, faults, columns).encode())
    print(f"\n{wording.terminal_table(tables, columns)}\n")
    for names, fault in wording.cautions(faults, columns):
        print(f"unreliable alone: {names} ({fault})")
    print(f"{wording.multiplicity(changes)}\n{wording.sentence(changes, faults)}\n{(out / PAGE).resolve()}")
