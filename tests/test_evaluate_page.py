"""The page: whole, self-contained, escaped, the same every time, and with a place for every claim."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_fixtures import COLUMNS, EIGHT, EVIL, compared, planted, recipe, result_of

from evaluate import compared as facts_of
from evaluate.compare import HIGHER, LOWER, NONE_SEEN, NOT_ALL, NOT_MATCHED, ONE_SEED, TWO_SEEDS, Comparison
from evaluate.page import render
from evaluate.recipes import PRETRAINED, Measured, Recipe
from evaluate.series import looks
from evaluate.verdicts import BAD, FEW_ROWS, GOOD, SIGNS, verdict_table

FOUR = ("unmasked", "masked 0.5", "gaussian (matched 0.5)", "small")
WITHOUT_TRUTH = ("full_", "recall", "data_", "mcc", "first", "ce_", "delta", "sae", "llm", "ood")
CLAIMS = [name for name, column in COLUMNS.items() if column.claim]


def page_of(measured: Measured) -> str:
    return render(measured, compared(measured), COLUMNS)


class Reader(HTMLParser):
    """Checks that every opened tag is closed in order; collects tags, ids and links."""

    VOID = ("meta", "br", "line", "circle", "path", "use", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Measured, Comparison, str]:
    """Four recipes, two architectures, one k, three seeds, with logs."""
    measured = planted(FOUR, ("batchtopk", "matryoshka"), logs=tmp_path_factory.mktemp("runs"))
    comparison = compared(measured)
    return measured, comparison, render(measured, comparison, COLUMNS)


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> tuple[Measured, Comparison, str]:
    """The full grid: eight recipes, three architectures, three k, five seeds and their controls."""
    logs = tmp_path_factory.mktemp("runs")
    measured = planted(EIGHT, ("batchtopk", "jumprelu", "matryoshka"), (3, 6, 12), 5, logs=logs)
    comparison = compared(measured)
    return measured, comparison, render(measured, comparison, COLUMNS)


def test_the_page_is_whole_and_self_contained(demo):
    page = demo[2]
    reader = read(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "img", "object"} & set(reader.seen)
    assert not re.search(r"(https?:)?//[a-z]|src=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_every_link_leads_to_a_place_on_the_page_and_every_mark_is_defined(grid):
    reader = read(grid[2])
    assert {link for link in reader.links if not link.startswith("#")} == set()
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))


def test_hostile_names_are_escaped_wherever_they_stand(tmp_path):
    names = ("unmasked", f"masked {EVIL}")
    measured = planted(names, (f"arch{EVIL}",), (3, 6), 2)
    evil = [
        replace(r, run=EVIL, recipe=replace(r.recipe, bench=EVIL, settings=EVIL if r.recipe.arch else ""))
        for r in measured.results
    ]
    measured = Measured(results=evil, missing=[f"no {EVIL}"], left_out={EVIL: EVIL})
    page = page_of(measured)
    assert "<script" not in page
    assert "alert('x')" not in page
    assert "&lt;script&gt;" in page
    assert "lifelt &lt;b&gt;" in page
    assert read(page).open == []


def test_a_hostile_model_name_in_run_json_is_escaped(tmp_path):
    measured = planted(n_seeds=2, logs=tmp_path)
    for file in tmp_path.rglob("run.json"):
        file.write_text(file.read_text().replace('"tiny"', '"<script>tiny"'))
    page = page_of(measured)
    assert "model &lt;script&gt;tiny" in page
    assert "<script" not in page


def test_the_verdict_comes_first_then_what_was_compared(demo):
    page = demo[2]
    places = [page.index(text) for text in ('class="sentence"', 'id="compared"', 'id="verdicts"', 'id="pictures"')]
    places += [page.index(text) for text in ('id="numbers"', 'id="limits"', 'id="words"')]
    assert places == sorted(places)


def test_every_claim_column_has_a_verdict_and_a_forest(demo):
    _, comparison, page = demo
    verdicts = page[page.index('id="verdicts"') : page.index('id="pictures"')]
    numbers = page[page.index('id="numbers"') : page.index('id="limits"')]
    for name in CLAIMS:
        assert f'title="{COLUMNS[name].meaning}"' in verdicts
        assert f"<summary>{COLUMNS[name].short}</summary>" in numbers
    table = verdict_table(comparison, COLUMNS, looks(comparison.tables))
    assert table is not None
    assert {head.short for head in table.heads} == {COLUMNS[name].short for name in CLAIMS}


def test_the_full_grid_is_small_and_folded(grid):
    measured, _, page = grid
    assert len(measured.results) > 360
    assert len(page.encode()) < 3_000_000
    assert 0 < page.count("<details open") < page.count("<details") / 2
    assert read(page).open == []


def test_the_same_results_give_the_same_bytes(demo):
    measured, comparison, page = demo
    assert render(measured, comparison, COLUMNS) == page


def test_one_run_alone_has_a_page_without_verdicts_and_without_empty_pictures():
    measured = planted(("unmasked",), n_seeds=1, controls=False, without=WITHOUT_TRUTH)
    bare = [replace(result, example=None, profiles={}) for result in measured.results]
    page = page_of(replace(measured, results=bare))
    assert "Nothing here says what masking does" in page
    assert 'id="verdicts"' not in page
    for absent in ("worked example", "usual and on shifted", "seed by seed", "against absorption", "Training curves"):
        assert absent not in page
    assert "<svg viewBox=" not in page.replace('class="key', "")
    assert read(page).open == []


@pytest.mark.parametrize("part", [0, 1])
def test_with_half_of_the_columns_the_page_still_renders(part):
    without = [name for i, name in enumerate(COLUMNS) if i % 2 == part]
    page = page_of(planted(FOUR, ks=(3, 6), n_seeds=2, without=without))
    assert read(page).open == []
    for name, column in COLUMNS.items():
        if column.claim:
            assert (f"<small>{name}</small>" in page) is (name not in without)


def test_nothing_at_all_still_makes_a_page():
    page = page_of(Measured())
    assert read(page).open == []
    assert "Nothing here says what masking does" in page


def test_one_seed_gives_no_verdict():
    measured = planted(n_seeds=1)
    comparison = compared(measured)
    table = verdict_table(comparison, COLUMNS, looks(comparison.tables))
    assert table is not None
    cells = [cell for _, rows in table.groups for row in rows for cell in row.cells if cell]
    assert {cell.verdict for cell in cells} == {ONE_SEED}
    assert {(cell.tone, cell.seeds, cell.span, cell.interval) for cell in cells} == {("", "", None, "")}
    assert "No verdict on masking" in page_of(measured)


def test_every_verdict_has_a_sign_of_its_own():
    assert set(SIGNS) == {LOWER, HIGHER, NONE_SEEN, NOT_MATCHED, NOT_ALL, ONE_SEED, TWO_SEEDS}
    assert len(set(SIGNS.values())) == len(SIGNS)


def test_a_verdict_is_good_where_the_column_says_so():
    comparison = compared(planted(("unmasked", "masked 1.0"), n_seeds=8))
    table = verdict_table(comparison, COLUMNS, looks(comparison.tables))
    assert table is not None
    ((_, (row,)),) = table.groups
    tones = {head.short: cell.tone for head, cell in zip(table.heads, row.cells, strict=True) if cell}
    assert tones["absorption cross"] == GOOD
    assert tones["EV"] == BAD


def test_the_interval_of_a_cell_holds_its_mean_and_the_line_only_if_it_holds_0(grid):
    comparison = grid[1]
    table = verdict_table(comparison, COLUMNS, looks(comparison.tables))
    assert table is not None
    for _, rows in table.groups:
        for cell in (cell for row in rows for cell in row.cells):
            assert cell is not None
            assert cell.span is not None
            assert cell.span[0] <= cell.place <= cell.span[1]
            assert (cell.place > 50) == cell.mean.startswith("+") or cell.mean == "0.000"


def test_the_overview_has_every_comparison_of_a_long_table_once(grid):
    comparison = grid[1]
    look = looks(comparison.tables)
    table = verdict_table(comparison, COLUMNS, look)
    assert table is not None
    n_rows = sum(len(rows) for _, rows in table.groups)
    assert n_rows == 3 * 3 * 7 > FEW_ROWS
    listed = sum(len(line) for row in table.overview for line in row.cells[0])
    assert (len(table.overview), listed) == (7, n_rows)
    noise = verdict_table(comparison, COLUMNS, look, against_noise=True)
    assert noise is not None
    assert {row.label.partition(" − ")[0] for _, rows in noise.groups for row in rows} == {"masked 0.5"}


def test_what_was_compared_is_stated_from_run_json(demo):
    facts = dict(facts_of.facts(demo[0]))
    assert "model tiny, hook point resid_post.2" in facts["Model and place"]
    assert "500k tokens" in facts["Model and place"]
    assert facts["Architectures"] == "batchtopk, matryoshka"
    assert facts["Seeds"] == "3 of each recipe: 0, 1, 2"
    assert "noise" in facts["Controls here"]
    assert facts["Controls absent"] == "dropout; random token"


def test_the_text_itself_is_compared_clean_and_masked():
    result = result_of(recipe("unmasked"), 0)
    values = {
        "data_child_given_parent_same_token_clean": 0.5,
        "data_child_given_parent_same_token_masked": 0.375,
        "data_child_given_parent_same_token_kept": 0.45,
        "data_phi_two_token_clean": 0.1,
    }
    rows = facts_of.data_pairs([replace(result, values={}), replace(result, values=values)])
    assert rows == [("same token: P(child | parent)", "0.500", "0.375", "0.450", "−0.125")]


def test_cautions_missing_and_left_out_runs_are_said(demo):
    _, comparison, page = demo
    limits = page[page.index('id="limits"') : page.index('id="words"')]
    assert "columns of &lt;something&gt; are missing" in limits
    assert "run_7, not finished; --resume" in limits
    assert "by chance alone" in limits
    assert "and not the order of the rows (--data-seed would)" in limits
    measured = replace(demo[0], order_varies=True)
    assert "starts from and the order of the rows;" in render(measured, comparison, COLUMNS)
    assert all(re.sub(r"[^ -~]|['<>&\"]", "", text)[:40] in limits for text in comparison.cautions)


def test_the_style_is_the_only_place_of_colours():
    for file in (Path(__file__).parent.parent / "evaluate" / "page").glob("*.jinja"):
        assert not re.search(r"#[0-9a-f]{6}\b", file.read_text()), file


def test_a_column_that_ranks_nothing_is_flagged_everywhere():
    columns = {**COLUMNS, "jaccard_mean": replace(COLUMNS["jaccard_mean"], reliable=False)}
    measured = planted()
    comparison = compared(measured, columns)
    page = render(measured, comparison, columns)
    table = verdict_table(comparison, columns, looks(comparison.tables))
    assert table is not None
    assert "known not to rank" in next(head.flag for head in table.heads if head.short == "Jaccard")
    assert page.count("known not to rank") >= 3  # the claims, the verdicts, all numbers


def test_pretrained_saes_and_several_caches_have_their_own_panels_and_rows():
    measured = planted(n_seeds=2)
    other = Recipe(bench="gpt2, resid_post.6", arch="jumprelu", k=40, d_sae=24576, name="gpt2-res-jb", kind=PRETRAINED)
    measured.results.append(result_of(other, 0))
    page = page_of(measured)
    assert read(page).open == []
    assert "jumprelu (gpt2, resid_post.6)" in page
    assert "gpt2-res-jb" in page
    assert "Model and place, one of 2" in page


def test_what_is_not_at_matched_l0_has_a_sign_and_no_tone():
    measured = planted(("unmasked", "masked 1.0"))
    apart = [
        replace(r, values={**r.values, "l0": r.values["l0"] * (1.3 if r.recipe.is_masked else 1.0)})
        for r in measured.results
    ]
    comparison = compared(replace(measured, results=apart))
    table = verdict_table(comparison, COLUMNS, looks(comparison.tables))
    assert table is not None
    cells = {
        (cell.verdict, cell.sign, cell.tone, cell.seeds) for _, (row,) in table.groups for cell in row.cells if cell
    }
    assert cells == {(NOT_MATCHED, "≠", "", "")}
    assert "No verdict on masking: no masked run has the L0" in page_of(replace(measured, results=apart))


def test_several_architectures_are_averaged_above_their_own_verdicts(grid, demo):
    for measured, comparison, page in (grid, demo):
        assert {d.n_pooled for d in comparison.pooled} >= {
            len({(r.recipe.arch, r.recipe.k) for r in measured.results if r.recipe.is_plain})
        }
        assert page.index("Averaged over architectures and k") < page.index("One by one")
    alone = planted(FOUR, ("batchtopk",))
    assert "Averaged over architectures" not in page_of(alone)
