"""Training curves: what log.jsonl says of every run, thinned, as the mean over the seeds of a recipe."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache_spec.untrusted import json_of
from evaluate.frontier import Figure, Line, Panel, axes, path_of, x_of, y_of
from evaluate.recipes import Recipe, Result
from evaluate.scale import Scale
from evaluate.series import Look, panels
from evaluate.wording import number
from train.run_folder import LOG

MAX_POINTS = 100
QUANTITIES = {  # key of a line of log.jsonl -> (what it is, in short)
    "explained_variance": ("explained variance of the training rows", "explained variance"),
    "loss": ("training loss", "loss"),
    "l0": ("latents on per training row", "L0"),
    "n_dead": ("latents that have not fired for a while", "dead latents"),
}
_BEGINNING = 0.1  # of training, which may lie off the scale

Log = dict[str, np.ndarray]  # key -> [n_lines], NaN where it says nothing


def read_log(folder: Path) -> Log | None:
    """At most MAX_POINTS evenly spaced lines of a run's log, the last among them; None if there is none to read."""
    try:
        lines = (folder / LOG).read_bytes().splitlines()
        chosen = np.unique(np.linspace(0, len(lines) - 1, min(MAX_POINTS, len(lines))).round().astype(int))
        facts = [json_of(lines[i]) for i in chosen]
        return {
            key: np.array([math.nan if line.get(key) is None else float(line[key]) for line in facts])
            for key in ("tokens", *QUANTITIES)
        }
    except (OSError, AttributeError, TypeError, ValueError, OverflowError):
        return None


def read_logs(results: Sequence[Result]) -> tuple[dict[Recipe, list[Log]], list[str]]:
    """The logs of every recipe, and the names of the runs whose log cannot be read."""
    found: dict[Recipe, list[Log]] = {}
    unread = []
    for result in results:
        if result.path is None:
            continue
        log = read_log(result.path)
        if log is None or not np.isfinite(log["tokens"]).sum() > 1:
            unread.append(result.run)
        else:
            found.setdefault(result.recipe, []).append(log)
    return found, unread


def mean_curve(logs: Sequence[Log], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mean over seeds), [n] each: at the first seed's tokens, the others interpolated, where all have some."""
    finite = [(log["tokens"][ok], log[key][ok]) for log in logs if (ok := np.isfinite(log[key] + log["tokens"])).any()]
    if not finite:
        return np.zeros(0), np.zeros(0)
    start, end = max(tokens[0] for tokens, _ in finite), min(tokens[-1] for tokens, _ in finite)
    grid = finite[0][0][(finite[0][0] >= start) & (finite[0][0] <= end)]
    return grid, np.mean([np.interp(grid, tokens, values) for tokens, values in finite], axis=0)


def curves(key: str, logs: Mapping[Recipe, Sequence[Log]], looks: Mapping[Recipe, Look]) -> Figure | None:
    """One quantity over tokens, one panel an architecture and k, one line a recipe; None if no log has it."""
    means = {recipe: mean_curve(those, key) for recipe, those in logs.items()}
    means = {recipe: (tokens, values) for recipe, (tokens, values) in means.items() if len(tokens) > 1}
    if not means:
        return None
    last = max(float(tokens[-1]) for tokens, _ in means.values())
    across = Scale(low=0.0, high=last)
    up = Scale.around(
        value for tokens, values in means.values() for value in values[tokens >= _BEGINNING * last].tolist()
    )
    made = []
    for title, recipes in panels(means, by_k=True).items():
        lines, words = [], []
        for recipe in recipes:
            tokens, values = (part.tolist() for part in means[recipe])
            inside = [(x, y) for x, y in zip(tokens, values, strict=True) if up.low <= y <= up.high]
            points = [(x_of(across, x), y_of(up, y)) for x, y in inside]
            lines.append(Line(look=looks[recipe], path=path_of(points)))
            words.append(f"{looks[recipe].label} {number(values[-1])}")
        text = f"{title}, at the end: {'; '.join(words)}"
        made.append(Panel(title=title, text=text, lines=tuple(lines), **axes(across, up)))
    note, short = QUANTITIES[key]
    return Figure(title=short, note=note, x_label="tokens", y_label=short, panels=tuple(made))
