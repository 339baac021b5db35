"""The sizes of the Triton kernels' blocks, and of the buffers between them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the work of one step is cut into programs."""

    rows: int
    """Of the batch, in the encoder's product."""
    latents: int
    """In the encoder's product; also what one group of slots covers."""
    depth: int
    """Of d_model, at a time."""
    columns: int
    """Of d_model or d_out, in gathers."""
    codes: int
    """Gathered rows at a time."""
    wide: int
    """Numbers a program takes where it goes over a list, or over a row of weights."""
    warps: int
    """Of the encoder's product."""
    stages: int
    """Of the encoder's product: blocks of depth that are on their way at the same time."""
    gather_warps: int
    """Of gathers: so few that each thread reads whole words of a row and no sum of rows crosses warps, which on an
    H200 is four times as fast as four warps on 512 columns."""


HALF = Blocks(rows=128, latents=128, depth=64, columns=256, codes=8, wide=1024, warps=8, stages=3, gather_warps=1)
"""Products in bfloat16 on tensor cores."""
SINGLE = Blocks(rows=64, latents=64, depth=32, columns=256, codes=8, wide=1024, warps=4, stages=3, gather_warps=2)
"""Products in float32."""
TINY = Blocks(rows=16, latents=16, depth=16, columns=16, codes=4, wide=32, warps=4, stages=3, gather_warps=1)
"""For the interpreter: several blocks of everything already in small tests."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a step has room for; a step that needs more is noticed and done anew."""

    slots: int
    """Candidates of a row in one tile of latents; a power of 2."""
    candidates: int
    """Of the batch."""
    row_candidates: int
    """Of one row, where a row alone decides; a power of 2."""
    codes: int
    """Of the batch."""


def power_of_2(n: float) -> int:
    """The first that is not below n."""
    return 1 << max(0, int(-(-n // 1)) - 1).bit_length()


def column_block(width: int, most: int) -> int:
    """A power of 2 for a row of this width."""
    return min(most, max(16, power_of_2(width)))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search for candidates met: whole numbers, on the host."""

    n_candidates: int
    most_in_cell: int
    most_in_row: int
    n_short: int
    """Rows (or batches) that have fewer than k a row above their bound, though there may be more below it."""
    n_codes: int

    @staticmethod
    def of(numbers: Tensor) -> "Found":
        """From int64 [5]."""
        n_candidates, most_in_cell, most_in_row, n_short, n_codes = numbers.tolist()
        return Found(
            n_candidates=n_candidates,
            most_in_cell=most_in_cell,
            most_in_row=most_in_row,
            n_short=n_short,
            n_codes=n_codes,
        )

    def fits(self, sizes: Sizes, *, by_row: bool) -> bool:
        """Whether all of it is in the buffers, and all that was wanted was found."""
        return (
            self.most_in_cell <= sizes.slots
            and self.n_candidates <= sizes.candidates
            and (not by_row or self.most_in_row <= sizes.row_candidates)
            and self.n_short == 0
            and self.n_codes <= sizes.codes
        )
