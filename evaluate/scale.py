"""Scales of the report's pictures: from a value to a place in a strip, linear or by powers of ten."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_SAME = 1e-9
_MARGIN = 0.06  # of a scale, left free at both ends
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LOG_FROM = 3.0  # values that differ by more than this factor are shown by powers of ten


def true_minus(text: str) -> str:
    """A true minus sign in place of the hyphen."""
    return text.replace("-", "−")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values to percent of a strip; `is_log`: equal factors are equally far apart."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def around(
        cls, values: Iterable[float], *, include: Sequence[float] = (), is_log: bool = False, margin: float = _MARGIN
    ) -> "Scale":
        """A scale that shows all finite values with some room on both sides."""
        finite = [value for value in (*values, *include) if math.isfinite(value)] or [1.0 if is_log else 0.0]
        low, high = min(finite), max(finite)
        if is_log:
            room = (high / low) ** margin if high > low else 1.5
            return cls(low=low / room, high=high * room, is_log=True)
        room = (high - low) * margin
        if room <= _SAME * max(abs(low), abs(high)):  # all the same, but for rounding
            room = 0.5
        return cls(low=low - room, high=high + room)

    @classmethod
    def across(cls, values: Iterable[float]) -> "Scale":
        """A scale for an L0: by powers of ten where it varies by a factor of 3 or more."""
        finite = [value for value in values if math.isfinite(value)] or [1.0]
        is_log = min(finite) > 0 and max(finite) / min(finite) >= _LOG_FROM
        return cls.around(finite, is_log=is_log, margin=2 * _MARGIN)  # marks of equal L0 are set apart

    def place(self, value: float) -> float:
        """Percent from the low end, held inside the strip."""
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def ticks(self, n: int = 5) -> list[tuple[float, str]]:
        """Round values on the scale: (percent, text); counts of thousands and more in short."""
        if self.is_log:
            return self._log_ticks()
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / n))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= n)
        values = np.arange(math.ceil(self.low / step), math.floor(self.high / step) + 1) * step
        digits = max(0, -math.floor(math.log10(step)))
        if step >= 1000:
            return [(self.place(value), true_minus(thousands(value))) for value in values.tolist()]
        return [(self.place(value), true_minus(f"{value:.{digits}f}")) for value in values.tolist()]

    def _log_ticks(self) -> list[tuple[float, str]]:
        """1, 2 and 5 times powers of ten; where that gives more than 7, the powers alone."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1,)):
            values = [factor * 10.0**power for power in powers for factor in factors]
            values = [value for value in values if self.low <= value <= self.high]
            if len(values) <= 7:
                break
        return [(self.place(value), _short(value)) for value in values]


def thousands(value: float) -> str:
    """A count in short: 512, 49k, 2.5M."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def _short(value: float) -> str:
    """A tick of a scale by powers of ten: 0.01 to 1000 as they are, smaller ones as powers."""
    power = round(math.log10(value))
    if power <= -3 and math.isclose(value, 10.0**power):
        return f"10{str(power).translate(_RAISED)}"
    return f"{value:g}"
