"""Counts and sizes as people write them on a command line."""

import re

from cache_spec.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_count(text: str, option: str) -> int:
    """`1M`, `500k`, `2.5M`, `1_000` -> a whole positive number. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", text.strip().lower().replace("_", ""))
    count = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if count < 1 or count != int(count):
        raise UserError(f"{option} is '{text}'; give a whole number such as 500k, 1M or 50_000")
    return int(count)


def parse_bytes(text: str, option: str) -> int:
    """`16G`, `500M`, `50GB` -> bytes. Raises UserError for anything else."""
    number, unit = text.strip().upper().removesuffix("IB").removesuffix("B"), ""
    if number and number[-1] in _BYTES:
        number, unit = number[:-1], number[-1]
    try:
        n_bytes = int(float(number) * _BYTES[unit])
    except (ValueError, OverflowError):
        n_bytes = 0
    if n_bytes < 1:
        raise UserError(f"{option} is '{text}'; give a size such as 16G or 500M")
    return n_bytes
