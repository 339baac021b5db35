"""report.html: one self-contained page, drawn by a template without scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluate import compared, curves, figures, frontier, histograms, verdicts, wording
from evaluate.columns import Column
from evaluate.compare import Comparison
from evaluate.recipes import Measured, Recipe, by_recipe
from evaluate.series import N_COLOURS, N_SHAPES, Look, legend, looks, panels
from evaluate.statistics import Estimate

_TEMPLATES = Path(__file__).parent / "page"
_ABSORPTION = (
    "full_absorption_same_token",
    "full_absorption_two_token",
    "full_absorption_cross_token",
    "first_letter_mean_full_absorption_score",
)
_FRONTIERS = (_ABSORPTION[2], _ABSORPTION[1], _ABSORPTION[0], _ABSORPTION[3])  # the first is open
_PROBE_KS = (1, 16)
_MAX_EXAMPLES = 2
_MANY_ROWS = 24  # recipes; of more, long lists start folded
_FIRST = 6  # cautions that are not folded


@dataclass(frozen=True, kw_only=True)
class NumberRow:
    """A recipe in the table of all numbers: (mean, error) per column, a dash where it has none."""

    label: str
    look: Look
    n_seeds: int
    cells: tuple[tuple[str, str], ...]


def render(measured: Measured, comparison: Comparison, columns: Mapping[str, Column]) -> str:
    """The page as HTML. Everything that comes from a run is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tables, look = comparison.tables, looks(comparison.tables)
    names = [name for name in columns if any(name in table for table in tables.values())]
    return environment.get_template("report.html.jinja").render(
        sentence=wording.sentence(comparison, columns),
        rows=wording.verdict_rows(comparison, columns),
        who=wording.WHO,
        facts=compared.facts(measured),
        pooled=_pooled(comparison, columns, look),
        verdicts=verdicts.verdict_table(comparison, columns, look),
        against_noise=verdicts.verdict_table(comparison, columns, look, against_noise=True),
        signs=verdicts.SIGNS,
        legend=legend(look),
        numbers=number_table(comparison, columns, look),
        faults=wording.faults(comparison.unreliable, columns),
        multiplicity=wording.multiplicity(comparison),
        order_varies=measured.order_varies,
        cautions=(comparison.cautions[:_FIRST], comparison.cautions[_FIRST:]),
        power_notes=[(wording.pair(*pair), note) for pair, note in comparison.power_notes.items()],
        missing=list(dict.fromkeys(measured.missing)),
        left_out=sorted(measured.left_out.items()),
        columns=(
            [(n, columns[n]) for n in names if columns[n].short],
            [(n, columns[n]) for n in names if not columns[n].short],
        ),
        is_long=len(tables) > _MANY_ROWS,
        plot=frontier,
        n_colours=N_COLOURS,
        n_shapes=N_SHAPES,
        **_pictures(measured, comparison, columns, look),
    )


def _pooled(
    comparison: Comparison, columns: Mapping[str, Column], look: Mapping[Recipe, Look]
) -> verdicts.VerdictTable | None:
    """The verdict table of differences averaged over architectures and k; each recipe looks as in one of them."""

    def facts(recipe: Recipe) -> tuple[str, str, int, str]:
        return recipe.bench, recipe.name, recipe.d_sae, recipe.settings

    by_facts = {facts(recipe): looks_of for recipe, looks_of in look.items()}
    looks_of = {d.recipe: by_facts[facts(d.recipe)] for d in comparison.pooled}
    return verdicts.verdict_table(replace(comparison, differences=comparison.pooled), columns, looks_of)


def _pictures(
    measured: Measured, comparison: Comparison, columns: Mapping[str, Column], look: Mapping[Recipe, Look]
) -> dict[str, Any]:
    """The pictures by the name that the template gives them; those of nothing measured are left out."""
    tables, groups = comparison.tables, by_recipe(measured.results)
    across = [frontier.across_l0(name, tables, columns, look) for name in frontier.ACROSS]
    frontiers = [frontier.frontier("explained_variance", name, groups, tables, columns, look) for name in _FRONTIERS]
    logs, unread = curves.read_logs(measured.results)
    bars = [(k, figures.probe_bars(k, tables, look)) for k in _PROBE_KS]
    examples = [result for result in measured.results if result.example is not None]
    dots = [figures.seed_dots(name, groups, columns, look) for name in _ABSORPTION]
    return {
        "across": [figure for figure in across if figure],
        "frontiers": [figure for figure in frontiers if figure],
        "densities": histograms.density(groups, look),
        "jaccards": histograms.jaccard(groups, look),
        "data_pairs": compared.data_pairs(measured.results),
        "curves": [figure for key in curves.QUANTITIES if (figure := curves.curves(key, logs, look))],
        "unread": unread,
        "bars": [(k, charts) for k, charts in bars if charts],
        "examples": [(wording.labels(tables)[r.recipe], look[r.recipe], r) for r in examples[:_MAX_EXAMPLES]],
        "dots": [figure for figure in dots if figure],
        "forest": figures.forest(comparison.differences, columns, look),
    }


def number_table(
    comparison: Comparison, columns: Mapping[str, Column], look: Mapping[Recipe, Look]
) -> tuple[list[verdicts.Head], list[tuple[str, list[NumberRow]]]]:
    """Heads, and the rows of each architecture with its controls; then the controls that belong to none."""
    tables = comparison.tables
    shown = [name for name, column in columns.items() if column.short and any(name in t for t in tables.values())]
    heads = [verdicts.head_of(name, columns, comparison.unreliable) for name in shown]
    groups = [
        (
            title,
            [
                _row(recipe, tables[recipe], label, shown, look)
                for recipe, label in figures.labels_within(recipes, look).items()
            ],
        )
        for title, recipes in panels(tables).items()
    ]
    placed = {recipe for recipes in panels(tables).values() for recipe in recipes}
    others = figures.labels_within([recipe for recipe in tables if recipe not in placed], look)
    if others:
        rows = [_row(recipe, tables[recipe], label, shown, look) for recipe, label in others.items()]
        groups.append(("every architecture", rows))
    return heads, groups


def _row(
    recipe: Recipe, table: Mapping[str, Estimate], label: str, shown: Sequence[str], look: Mapping[Recipe, Look]
) -> NumberRow:
    cells = tuple(
        (wording.number(table[name].mean), wording.error_of(table[name])) if name in table else ("–", "")
        for name in shown
    )
    n_seeds = max((estimate.n for estimate in table.values()), default=0)
    return NumberRow(label=label, look=look[recipe], n_seeds=n_seeds, cells=cells)
