"""The comparison with other tools: what it counts as the same, as a tie, and as another SAE."""

import pytest
import torch

from benchmarks.compat import MOST_TIES, Cell, _fill, print_table
from train.activations import ReLU
from train.sae import SparseAutoencoder, initialise
from train.stored import Stored


def compared(change: str) -> Cell:
    sae = SparseAutoencoder(6, 16, ReLU())
    initialise(sae, 0, entries="normal", norm=1.0)
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes, made = sae.encode(x), sae(x)
    if change == "other values":
        codes = codes * 1.001
    if change == "other decoder":
        made = made + 0.01
    if change.endswith("off"):
        codes[: int(change.split()[0])] = 0
    cell = Cell(run="run", tool="saelens", kind="standard")
    _fill(cell, Stored(sae=sae, metadata={}), x, {"codes": codes, "made": made})
    return cell


@pytest.mark.parametrize(
    ("change", "fails"),
    [("nothing", False), ("other values", True), ("other decoder", True), ("1 off", False), ("9 off", True)],
)
def test_other_numbers_fail_and_so_do_more_than_a_few_ties(change, fails):
    cell = compared(change)
    assert cell.fails == fails
    assert cell.n_ties == (int(change[0]) if change.endswith("off") else 0)
    assert MOST_TIES < 9


def test_the_table_says_why_a_cell_is_empty(capsys):
    print_table([compared("nothing"), Cell(run="run", tool="sparsify", reason="it cannot")], ["saelens", "sparsify"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["run", "standard", "0e+00", "0e+00", "-"]
    assert lines[3] == "- sparsify: it cannot"
