"""The picture of the README, drawn from the averages in docs/masking-grid.md: docs/picture-light.svg and -dark.svg.

python -m benchmarks.picture
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPES = {  # as the table has them, and as the picture says them
    "masked 0.25": "masked, a quarter of the rows",
    "masked 0.5": "masked, half of the rows",
    "masked 1": "masked, all rows",
    "gaussian": "Gaussian noise, matched",
    "dropout": "dropout, matched",
    "small (220)": "a smaller dictionary",
}
PANELS = {  # column, heading, from, to, ticks
    "abs cross": ("absorption across tokens", -0.13, 0.04, (-0.1, -0.05, 0)),
    "abs same": ("absorption on one token", -0.13, 0.04, (-0.1, -0.05, 0)),
    "ΔCE": ("loss with the SAE in, nats", -0.04, 0.12, (0, 0.05, 0.1)),
}
COLOURS = {
    "light": {"ink": "#1f2328", "quiet": "#59636e", "line": "#d1d9e0", "box": "#f6f8fa", "ours": "#0969da"},
    "dark": {"ink": "#f0f6fc", "quiet": "#9198a1", "line": "#3d444d", "box": "#151b23", "ours": "#4493f8"},
}
STEPS = (
    ("harvest once", "the model reads the text, clean and", "with tokens replaced: one cache"),
    ("train many", "every SAE of a sweep from one read,", "masked rows at an exact share"),
    ("measure", "matched L0, paired seeds, intervals,", "beside noise, random and oracle"),
)
WIDTH, LEFT, PANEL, GAP, TOP, ROW = 880, 196, 214, 14, 158, 26


@dataclass(frozen=True)
class Effect:
    """A difference to unmasked training: mean and 95 % interval."""

    mean: float
    low: float
    high: float


def effects(page: str) -> dict[str, dict[str, Effect]]:
    """recipe -> column -> effect, from the page's table of averages."""
    table = page.partition("## Averaged over architectures and k")[2].partition("\n## ")[0]
    rows = [
        [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        for line in table.replace("−", "-").splitlines()
        if line.startswith("|")
    ]
    columns = rows[0][1:]
    return {row[0]: dict(zip(columns, map(_effect, row[1:]), strict=True)) for row in rows[2:]}


def _effect(cell: str) -> Effect:
    mean, low, high = map(float, re.findall(r"[-+]?\d*\.\d+", cell))
    return Effect(mean, low, high)


def draw(found: dict[str, dict[str, Effect]], scheme: str) -> str:
    """The picture as SVG, in the colours of a scheme."""
    colours = COLOURS[scheme]
    bottom = TOP + ROW * len(RECIPES)
    parts = [_steps(colours)]
    parts += [
        _text(LEFT - 14, TOP + ROW * (i + 0.5) + 4, words, colours["ours" if name in _OURS else "ink"], anchor="end")
        for i, (name, words) in enumerate(RECIPES.items())
    ]
    for i, (column, (heading, low, high, ticks)) in enumerate(PANELS.items()):
        left = LEFT + i * (PANEL + GAP)
        parts.append(_text(left + PANEL / 2, TOP - 12, heading, colours["ink"], weight=600))
        parts += _axis(left, bottom, low, high, ticks, colours)
        for j, name in enumerate(RECIPES):
            colour = colours["ours" if name in _OURS else "quiet"]
            parts += _interval(found[name][column], left, TOP + ROW * (j + 0.5), low, high, colour)
    parts.append(_text(WIDTH / 2, bottom + 46, _NOTE, colours["quiet"]))
    size = f'width="{WIDTH}" height="{bottom + 62}" viewBox="0 0 {WIDTH} {bottom + 62}"'
    font = 'font-family="-apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="13"'
    title = "<title>Harvest once, train many, measure; and what masking did on the embedded model</title>"
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">', title, *parts, "</svg>\n"])


_NOTE = (
    "Difference to unmasked training of the embedded model, mean and 95 % interval over 5 seeds; "
    "each is the mean over 3 architectures and 3 k."
)
_OURS = [name for name in RECIPES if name.startswith("masked")]


def _steps(colours: dict[str, str]) -> str:
    """Three boxes with arrows between them."""
    parts, width, gap = [], 268, 38
    for i, (name, *lines) in enumerate(STEPS):
        left = i * (width + gap)
        box = f'x="{left + 0.5}" y="8.5" width="{width - 1}" height="94" rx="8"'
        parts.append(f'<rect {box} fill="{colours["box"]}" stroke="{colours["line"]}"/>')
        parts.append(_text(left + width / 2, 38, name, colours["ours"], weight=600, size=17))
        parts += [_text(left + width / 2, 64 + 20 * j, line, colours["ink"]) for j, line in enumerate(lines)]
        if i:
            path = f"M{left - gap + 8} 56H{left - 10}m-7 -6l7 6l-7 6"
            parts.append(f'<path d="{path}" fill="none" stroke="{colours["quiet"]}" stroke-width="2"/>')
    return "\n".join(parts)


def _axis(
    left: float, bottom: float, low: float, high: float, ticks: tuple[float, ...], colours: dict[str, str]
) -> list[str]:
    parts = [f'<path d="M{left} {bottom + 0.5}h{PANEL}" stroke="{colours["line"]}"/>']
    for tick in ticks:
        x = _x(tick, left, low, high)
        colour = colours["quiet" if tick == 0 else "line"]
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{colour}"/>')
        words = f"{tick:+.2f}".replace("-", "−") if tick else "0"
        parts.append(_text(x, bottom + 18, words, colours["quiet"], size=12))
    return parts


def _interval(effect: Effect, left: float, y: float, low: float, high: float, colour: str) -> list[str]:
    start, middle, end = (_x(value, left, low, high) for value in (effect.low, effect.mean, effect.high))
    line = f'<path d="M{start:.1f} {y}H{end:.1f}" stroke="{colour}" stroke-width="2.5" stroke-linecap="round"/>'
    return [line, f'<circle cx="{middle:.1f}" cy="{y}" r="4.5" fill="{colour}"/>']


def _x(value: float, left: float, low: float, high: float) -> float:
    assert low <= value <= high, f"{value} is outside of the panel"
    return left + (value - low) / (high - low) * PANEL


def _text(
    x: float, y: float, words: str, colour: str, *, anchor: str = "middle", weight: int = 400, size: int = 13
) -> str:
    look = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}" font-size="{size}"'
    return f'<text x="{x:g}" y="{y:g}" {look}>{words}</text>'


def main() -> None:
    """Write both pictures."""
    found = effects((ROOT / "docs/masking-grid.md").read_text())
    for scheme in COLOURS:
        (ROOT / f"docs/picture-{scheme}.svg").write_text(draw(found, scheme))


if __name__ == "__main__":
    main()
