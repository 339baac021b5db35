"""Progress that suits where it goes: a bar on a terminal, one line every few seconds in a log."""

import sys
import time

from tqdm import tqdm

from cache_spec.untrusted import printable

LINE_EVERY_S = 5.0


class Progress:
    """Counts done work of a known total. Use as a context manager; `advance(n, note)` as work is done."""

    def __init__(self, what: str, total: int, unit: str, *, shown: bool = True) -> None:
        """Unless it is `shown`, it counts in silence: another process of the same job shows its own."""
        self._what = what = printable(what)  # the name of a folder, which a stranger may have packed
        self._total, self._unit, self._shown = total, unit, shown
        self._done, self._note = 0, ""
        self._start = self._last_line = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=total > 9999) if on_terminal else None

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` is a short status such as a loss, or a name that a stranger chose."""
        self._done, self._note = self._done + n, printable(note) or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._print_line()

    def expect(self, total: int) -> None:
        """Change how much there is to do, what is done included."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        if not self._shown:
            return
        rate = self._done / max(self._last_line - self._start, 1e-9)
        left = _clock((self._total - self._done) / rate) if rate > 0 else "unknown"
        note = f", {self._note}" if self._note else ""
        print(
            f"{self._what}: {self._done:,}/{self._total:,} {self._unit} ({rate:,.1f}/s, {left} left{note})",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done:
            self._print_line()


def _clock(seconds: float) -> str:
    """Minutes and seconds, m:ss, and hours before them when there are any."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
