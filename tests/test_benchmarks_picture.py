"""The README's picture is of the numbers in docs/masking-grid.md, and its script draws what it read."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.picture import COLOURS, PANELS, RECIPES, Effect, draw, effects

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/masking-grid.md").read_text()


@pytest.mark.parametrize("scheme", COLOURS)
def test_the_picture_in_docs_is_the_one_of_its_numbers(scheme):
    assert (ROOT / f"docs/picture-{scheme}.svg").read_text() == draw(effects(PAGE), scheme)
    assert f"docs/picture-{scheme}.svg" in (ROOT / "README.md").read_text()


def test_the_numbers_are_those_of_the_table():
    found = effects(PAGE)
    assert found["masked 0.5"]["abs cross"] == Effect(-0.054, -0.088, -0.021)
    assert found["masked 1"]["AUC1"] == Effect(0.026, 0.017, 0.035)  # bold in the table
    assert set(RECIPES) <= set(found)


@pytest.mark.parametrize("scheme", COLOURS)
def test_one_point_for_each_recipe_in_each_panel_and_nothing_beyond_the_edges(scheme):
    root = ElementTree.fromstring(draw(effects(PAGE), scheme))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    points = root.findall("{*}circle")
    assert len(points) == len(RECIPES) * len(PANELS)
    assert len({point.attrib["cy"] for point in points}) == len(RECIPES)
    for text in root.findall("{*}text"):
        size, x, words = float(text.attrib["font-size"]), float(text.attrib["x"]), text.text or ""
        half = 0.24 * size * len(words)  # letters are a little less than half as wide as high
        left = {"middle": x - half, "end": x - 2 * half}[text.attrib["text-anchor"]]
        assert 0 <= left <= left + 2 * half <= width + 1, words
        assert float(text.attrib["y"]) < height


@pytest.mark.parametrize("scheme", COLOURS)
def test_the_words_can_be_read_on_github_s_background(scheme):
    background = {"light": "#ffffff", "dark": "#0d1117"}[scheme]
    for name in ("ink", "quiet", "ours"):
        assert contrast(COLOURS[scheme][name], background) >= 4.5


def contrast(one: str, other: str) -> float:
    """The ratio of luminances as WCAG has it."""
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part, 16) / 255 for part in re.findall(r"[0-9a-f]{2}", colour)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
