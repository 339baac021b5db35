"""What a stranger may have made: JSON of a bounded size and depth, folders without links, text that goes to a terminal.

Nothing here runs code of a file. A folder that was downloaded may hold a link to any file of this machine: read through
it, that file could be pushed to the hub; written through it, it would be lost. So no link is followed, wherever it
leads. The folder itself may be one: whoever names it knows it.
"""

import json
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

from cache_spec.errors import CacheDamaged

MOST_BYTES = 2**26  # of a JSON document; what we write of one thing is a thousand times smaller
MOST_DEPTH = 50  # of lists and objects in each other; what we write has ten
_MOST_DIGITS = 40  # of a whole number
_INVISIBLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of characters, ends of lines
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # what turns text around


def read_bounded(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises ValueError if it is no plain file (a device never ends) or larger than `most`."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no plain file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size:,} bytes, and {most:,} are the most that are read")
    return path.read_bytes()


def json_of(data: bytes, *, finite: bool = False) -> Any:
    """Parsed JSON, if people could have written it: ValueError for anything else, and for too deep or too long a part.

    With `finite` NaN and infinity are refused, which JSON does not have and Python reads.
    """
    try:
        text = data.decode()
        number = _finite if finite else float
        found = json.loads(text, parse_int=_whole, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("its lists and objects lie too deep in each other") from None
    _check_depth(found)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half a character") from None
    return found


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0.0:
        raise ValueError(f"{text[:40]} is no number")
    return number


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a whole number in it has {len(text)} digits")
    return int(text)


def _check_depth(found: Any) -> None:
    """Raises ValueError if containers lie deeper than MOST_DEPTH. Looks at containers alone, level by level."""
    level = [found]
    for _ in range(MOST_DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [part for items in inside for part in items if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError("its lists and objects lie too deep in each other")


def refuse_links(folder: Path, advice: str) -> None:
    """Raises CacheDamaged if anything in a folder is a link, or neither a file nor a folder. Reads no file.

    Looking through the names takes as long as asking for the sizes, which opening a cache does anyway.
    """
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise CacheDamaged(f"{entry.path} is a link, which may lead anywhere; {advice}")
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                        raise CacheDamaged(f"{entry.path} is neither a file nor a folder; {advice}")
        except FileNotFoundError:
            continue  # somebody tidied up


def printable(text: str) -> str:
    """The text as a terminal may get it: what would move its cursor, or turn the text around, is spelled out."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(ascii(letter)[1:-1] if _is_unsafe(letter) else letter for letter in text)


def _is_unsafe(letter: str) -> bool:
    unseen = unicodedata.category(letter) in _INVISIBLE or unicodedata.bidirectional(letter) in _TURNING
    return unseen and letter not in "\n\t"
