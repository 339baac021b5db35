"""Markdown for the hub's cards. Text that came from data cannot become markup, a link or another line."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+|~!&$:@-])")


def plain(text: object) -> str:
    """Text that a Markdown reader shows as it is, on one line, in a paragraph or a table."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; its cells are shown as they are."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def front_matter(facts: Mapping[str, Any]) -> str:
    """The YAML before a card. JSON is YAML, so nothing in a value can end it or add a key."""
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in facts.items()), "---"])
