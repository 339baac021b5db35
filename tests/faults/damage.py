"""Damage to files, undone afterwards, and what a command says to it."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from promises import REMEDY

from cache_spec import UserError

Damage = Callable[[bytes, random.Random], bytes]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One bit of one byte is another."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut_short(data: bytes, rng: random.Random) -> bytes:
    """The end is missing: all of it, one byte, or anything between."""
    return data[: rng.choice((0, len(data) - 1, rng.randrange(len(data))))]


def lost(data: bytes, rng: random.Random) -> None:
    """The file is gone."""


DAMAGE: dict[str, Callable] = {"a flipped bit": flipped, "cut short": cut_short, "gone": lost}


@contextmanager
def damaged(path: Path, how: Callable, rng: random.Random) -> Iterator[None]:
    """While inside, the file is damaged."""
    whole = path.read_bytes()
    spoiled = how(whole, rng)
    if spoiled is None:
        path.unlink()
    else:
        path.write_bytes(spoiled)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)


@contextmanager
def swapped(one: Path, other: Path) -> Iterator[None]:
    """While inside, each file has the other's content."""
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second, f"{one} and {other} are alike"
    one.write_bytes(second)
    other.write_bytes(first)
    try:
        yield
    finally:
        one.write_bytes(first)
        other.write_bytes(second)


def kinds(root: Path) -> dict[str, list[Path]]:
    """The files under a folder by kind: names that differ in their numbers are of one. Locks hold nothing."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size):
        found.setdefault(re.sub(r"\d+", "#", path.relative_to(root).as_posix()), []).append(path)
    return found


def refusal(command: Callable[[], object], path: Path, *, names: tuple[str, ...] = ()) -> str:
    """The sentence with which a command refuses; empty if it does not. It names the file and what to do."""
    refused: UserError | None = None
    try:
        command()
    except UserError as error:
        refused = error
    if refused is None:
        return ""
    sentence = str(refused)
    assert refused.exit_code in (1, 2)
    assert "\n" not in sentence
    assert any(name in sentence for name in (path.name, str(path), *names)), f"{path} is not named: {sentence}"
    assert re.search(REMEDY, sentence.partition(str(path))[2] or sentence), f"no remedy: {sentence}"
    return sentence
