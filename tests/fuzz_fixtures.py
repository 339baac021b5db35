"""Input that a stranger may have made: documents near the true ones, damaged files, and what may come out of them."""

import copy
import json
import math
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from cache_spec.errors import UserError
from cache_spec.files import seal

# what nobody who writes such a document would put there, and what overflows, escapes or never ends if it is believed
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**18, 10**39, -(10**18), 0.0, -0.5, 1e308, 1e-320),
    *(math.nan, math.inf, -math.inf),  # which Python writes and reads, and JSON does not have
    *("", "..", "../../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "\u202e", "٣", "NaN", "clean", "9" * 5000),
    *([], {}, [[]], [None], {"": None}, [0] * 50, {"../x": 1}, "1.9999", "layer_" + "1" * 300, "x" * 5000),
    "__import__('os').system('true')",
)


def values() -> st.SearchStrategy[Any]:
    """Any JSON, the strange first."""
    number = st.integers(-(10**38), 10**38) | st.floats(allow_nan=False, allow_infinity=False)
    texts = st.text(max_size=20)
    nested = st.recursive(
        st.none() | st.booleans() | number | texts,
        lambda inside: st.lists(inside, max_size=3) | st.dictionaries(texts, inside, max_size=3),
    )
    return st.sampled_from(STRANGE) | nested


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document, itself first."""
    yield at
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inside:
        yield from places(value, (*at, key))


def changed(document: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy whose value at a place was changed by `change(container, key)`."""
    holder = {"": copy.deepcopy(document)}
    container, key = holder, ""
    for step in at:
        container, key = container[key], step
    change(container, key)
    return holder.get("")


@st.composite
def near(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three of its values replaced, taken out or given a neighbour."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(document))))
        value, kind = draw(values()), draw(st.sampled_from(("replace", "replace", "remove", "add")))

        def change(container: Any, key: Any, value: Any = value, kind: str = kind) -> None:
            if kind == "remove" and key != "":
                del container[key]
            elif kind == "add" and isinstance(container[key], dict):
                container[key][str(value)[:50]] = value
            elif kind == "add" and isinstance(container[key], list):
                container[key].append(value)
            else:
                container[key] = value

        document = changed(document, at, change)
    return document


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with one to four pieces changed, cut out, doubled or put in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(found))), draw(st.integers(0, 16))
        found[at : at + n] = draw(st.binary(max_size=16) | st.just(bytes(found[at : at + n] * 3)))
    return bytes(found)


def spelled(document: Any) -> bytes:
    """As our files are written."""
    return (json.dumps(document, indent=1) + "\n").encode()


def sealed(document: Any) -> Any:
    """With the checksum that a stranger can make as well as we can; what has none stays, as what holds NaN."""
    if not isinstance(document, dict):
        return document
    try:
        return seal({key: value for key, value in document.items() if key != "crc32c"})
    except ValueError:
        return document


@contextmanager
def only_user_errors() -> Iterator[None]:
    """UserError and its family may come out, with a sentence; anything else fails the test."""
    try:
        yield
    except UserError as error:
        if not 10 < len(str(error)) < 4000:
            raise AssertionError(f"an error of {len(str(error))} letters: {error!s:.200}") from error


@contextmanager
def bounded(seconds: float = 20.0, n_bytes: int = 2**31) -> Iterator[None]:
    """No more time and memory than this for one example: what asks for more fails."""
    with open("/proc/self/statm") as file:
        n_now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (n_now + n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _too_long(*_: object) -> None:
    raise AssertionError("this example has no end")


def everything(folder: Path) -> dict[str, bytes | str]:
    """Every name below a folder and what it holds, links as what they say: to see that nothing was touched."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        mode = os.lstat(path).st_mode
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else ""
    return found


@dataclass(frozen=True)
class Target:
    """What is drawn, and what is done with it; anything but a UserError is a fault of ours."""

    drawn: st.SearchStrategy[Any]
    use: Callable[[Any], None]


def replacing(path: Path, use: Callable[[], None]) -> Callable[[bytes], None]:
    """Use a folder while one of its files holds something else."""
    true = path.read_bytes()

    def with_data(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with bounded():
                use()
        finally:
            path.write_bytes(true)

    return with_data


def document(path: Path, use: Callable[[], None], *, seal: Callable[[Any], Any] = lambda facts: facts) -> Target:
    """A JSON file: near what it says, sealed or not, or its bytes damaged."""
    replace = replacing(path, use)
    drawn = near(json.loads(path.read_bytes()))
    return Target(drawn.map(spelled) | drawn.map(seal).map(spelled) | damaged(path.read_bytes()), replace)


def data(path: Path, use: Callable[[], None]) -> Target:
    """A file of bytes."""
    return Target(damaged(path.read_bytes()), replacing(path, use))
