"""What a column of the report is: one line of meaning, and how it may be ranked."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of a metric.

    better: "higher", "lower", or "" for a number that ranks nothing (an L0, say).
    claim: one of the few columns that the paper's claims are about; their comparisons are corrected for their own
    number, all others for the number of all.
    paired: values of different seeds are independent, so differences paired by seed may be tested. Not so for agreement
    between seeds.
    oracle_is_best: the perfect dictionary bounds it, so a trained SAE that beats it shows a fault of the metric.
    random_is_worst: an untrained SAE should not beat a trained one.
    reliable: False for a number that is known not to rank SAEs, shipped for what it describes; `meaning` says why.
    parts, counted: a mean over parts of which each SAE has its own, such as the parents that it represents. Pairs of
    seeds are compared over the parts that both have: the numbers `parts@name` where `counted@name` is 1 in both, if
    these are half of all.
    short: heading in the page's table and the paired comparison; a column without one is in report.json only.
    terminal: also in the table that the command prints.
    """

    meaning: str
    better: str = ""
    claim: bool = False
    paired: bool = True
    oracle_is_best: bool = False
    random_is_worst: bool = True
    reliable: bool = True
    parts: str = ""
    counted: str = ""
    short: str = ""
    terminal: bool = False


def column_of(columns: Mapping[str, Column], name: str) -> Column:
    """The column of a number: `explained_variance`, or one part of it such as `sae_top_1_test_auc@topic`."""
    return columns[name.partition("@")[0]]
