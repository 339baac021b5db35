"""Counts on a command line: what people write, and what is refused."""

import pytest

from cache_spec.counts import parse_count
from cache_spec.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"), [("1M", 10**6), ("500k", 500_000), ("2.5m", 2_500_000), ("50_000", 50_000), (" 7 ", 7)]
)
def test_counts_are_read_as_people_write_them(text, count):
    assert parse_count(text, "--tokens") == count


@pytest.mark.parametrize("text", ["", "0", "-5", "M", "1.5", "0.0001k", "1e6", "1MM", "many", "nan"])
def test_what_is_no_whole_positive_number_is_refused(text):
    with pytest.raises(UserError, match=f"--tokens is '{text}'"):
        parse_count(text, "--tokens")
