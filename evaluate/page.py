"""report.html: one self-contained page, drawn by a template without scripts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluate import figures, wording
from evaluate.columns import Column
from evaluate.compare import TRAINED, Difference, Estimate, Recipe, by_recipe
from evaluate.measuring import Measured
from evaluate.metrics.absorption import FAMILIES
from evaluate.metrics.probing import KS

_TEMPLATES = Path(__file__).parent / "page"


def render(
    measured: Measured,
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    differences: Sequence[Difference],
    unreliable: Mapping[str, str],
    columns: Mapping[str, Column],
) -> str:
    """The page as HTML. Everything that comes from a run is escaped."""
    named, hue = wording.labels(tables), figures.colours(tables)
    groups = by_recipe(measured.results)
    dots = [
        figures.dot_plot(
            f"{family.replace('_', '-')} absorption",
            columns[f"full_absorption_{family}"].meaning,
            f"full_absorption_{family}",
            groups,
            named,
            hue,
        )
        for family in FAMILIES
        if f"full_absorption_{family}" in columns
    ]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        sentence=wording.sentence(differences, unreliable),
        multiplicity=wording.multiplicity(differences) if differences else "",
        missing=measured.missing,
        cautions=wording.cautions(unreliable, columns),
        table=_table(tables, columns, unreliable, named, hue),
        forest=figures.forest(differences, columns, named, hue),
        baseline=sorted({named[difference.baseline] for difference in differences}),
        dots=[chart for chart in dots if chart is not None],
        scatter=figures.scatter("explained_variance", "mean_full_absorption_score", groups, named, hue),
        architectures=list(dict.fromkeys(recipe.arch for recipe in tables if recipe.kind == TRAINED)),
        legend=_legend(tables, hue),
        probes=[(k, bars) for k in KS if (bars := figures.probe_bars(k, tables, named, hue))],
        examples=[(named[example.recipe], hue[example.recipe], example) for example in measured.examples],
        histograms=figures.histograms({recipe: measured.densities[recipe] for recipe in tables}, named, hue),
        columns={name: column for name, column in columns.items() if any(name in table for table in tables.values())},
        n_colours=figures.N_COLOURS,
    )


def _legend(tables: Mapping[Recipe, Mapping[str, Estimate]], hue: Mapping[Recipe, int]) -> list[tuple[int, str]]:
    """(colour, recipe name) once each."""
    trained = [recipe for recipe in tables if recipe.kind == TRAINED]
    largest = max((recipe.d_sae for recipe in trained), default=0)
    names = {hue[r]: " ".join([r.name, f"{r.d_sae} latents" * (r.d_sae != largest), r.settings]) for r in trained}
    return sorted(names.items())


def _table(
    tables: Mapping[Recipe, Mapping[str, Estimate]],
    columns: Mapping[str, Column],
    unreliable: Mapping[str, str],
    named: Mapping[Recipe, str],
    hue: Mapping[Recipe, int],
) -> dict[str, Any]:
    """Heads (short name, meaning, flag) and rows (label, colour, seeds, cells) of the table of recipes."""
    shown = [
        name for name, column in columns.items() if column.short and any(name in table for table in tables.values())
    ]
    heads = [(columns[name].short, columns[name].meaning, unreliable.get(name, "")) for name in shown]
    rows = [
        (
            named[recipe],
            hue[recipe],
            max((estimate.n for estimate in table.values()), default=0),
            [
                (wording.number(table[name].mean), wording.error_of(table[name])) if name in table else ("–", "")
                for name in shown
            ],
        )
        for recipe, table in tables.items()
    ]
    return {"heads": heads, "rows": rows}
