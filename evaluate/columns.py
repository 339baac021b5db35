"""What a column of the report is: one line of meaning, and how it may be ranked."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of a metric.

    better: "higher", "lower", or "" for a number that ranks nothing (an L0, say).
    oracle_is_best: the perfect dictionary bounds it, so a trained SAE that beats it shows a fault of the metric.
    random_is_worst: an untrained SAE should not beat a trained one.
    short: heading in the page's table and the paired comparison; a column without one is in report.json only.
    terminal: also in the table that the command prints.
    """

    meaning: str
    better: str = ""
    oracle_is_best: bool = False
    random_is_worst: bool = True
    short: str = ""
    terminal: bool = False
