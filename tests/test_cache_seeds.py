"""Seeds: equal purposes give equal seeds, and nothing else does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cache_spec import derive_seed

PARTS = st.lists(st.integers() | st.text(), max_size=4)


def test_pinned_values_never_change():
    """A cache's masks and a run's start follow from these."""
    assert derive_seed("train/init", 0) == 6589222621143802118
    assert derive_seed("harvest/mask", 0, "masked", 3) == 1107270660242478612


@given(purpose=st.text(), parts=PARTS)
def test_a_seed_fits_every_generator(purpose, parts):
    seed = derive_seed(purpose, *parts)
    assert 0 <= seed < 2**63
    np.random.Generator(np.random.Philox(seed))


@given(a=st.tuples(st.sampled_from(["x", "x/y", "z"]), PARTS), b=st.tuples(st.sampled_from(["x", "x/y", "z"]), PARTS))
def test_only_equal_purposes_share_a_seed(a, b):
    (one, first), (other, second) = a, b
    separator = any("\x1f" in part for part in [*first, *second] if isinstance(part, str))
    if not separator:
        assert (derive_seed(one, *first) == derive_seed(other, *second)) == (a == b)


def test_small_seeds_of_different_purposes_never_meet():
    seeds = {derive_seed(purpose, i) for purpose in ("train/init", "train/order", "harvest/mask") for i in range(1000)}
    assert len(seeds) == 3000


def test_a_number_and_its_text_are_different_parts():
    assert derive_seed("a", 1) != derive_seed("a", "1")
    assert derive_seed("a", 1, 2) != derive_seed("a", 12)
    assert derive_seed("a", "b") != derive_seed("ab")


def test_another_process_derives_the_same_seed():
    code = "from cache_spec import derive_seed; print(derive_seed('a', 1, 'b'))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) == derive_seed("a", 1, "b")
