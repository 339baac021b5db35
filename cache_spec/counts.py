"""Counts as people write them on a command line."""

import re

from cache_spec.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(text: str, option: str) -> int:
    """`1M`, `500k`, `2.5M`, `1_000` -> a whole positive number. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", text.strip().lower().replace("_", ""))
    count = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if count < 1 or count != int(count):
        raise UserError(f"{option} is '{text}'; give a whole number such as 500k, 1M or 50_000")
    return int(count)
