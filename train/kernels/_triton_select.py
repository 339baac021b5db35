# type: ignore - the functions below are in Triton's language, whose types a checker of Python does not know
"""Triton: which candidates are codes. Exact: thresholds are found in the bits of the numbers, not by halving.

The bits of a positive float32, read as an integer, order as the numbers do. NaN counts as the largest, as where torch
sorts. Values that are not positive are never codes.
"""

import triton
import triton.language as tl

BINS = tl.constexpr(2048)
NAN_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(value):
    """An integer that orders as the values do, 0 for those that are not positive."""
    key = tl.where(value != value, NAN_KEY, value.to(tl.int32, bitcast=True))
    return tl.maximum(key, 0)


@triton.jit
def histogram(value, total, found, bins, capacity, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """bins [n_programs, BINS]: positive candidates by BITS of their keys, of those that share the bits found so far.

    found [2] int32: the leading bits of the wanted key, and which largest of those that share them it is.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_one = place < tl.minimum(tl.load(total), capacity)
    key = key_of(tl.load(value + place, mask=is_one, other=0.0))
    shares = (key > 0) & ((key >> (SHIFT + BITS)) == tl.load(found))
    bin = tl.where(shares, (key >> SHIFT) & ((1 << BITS) - 1), 0)
    counted = tl.histogram(bin, BINS)
    at = tl.arange(0, BINS)
    others = BLOCK - tl.sum(shares.to(tl.int32), 0)  # they were counted in bin 0
    tl.store(bins + tl.program_id(0) * BINS + at, counted - tl.where(at == 0, others, 0))


@triton.jit
def find_bin(bins, found, BITS: tl.constexpr):
    """Append to found the bin [BINS] that holds the wanted key; zeros if there are fewer keys than wanted."""
    at = tl.arange(0, BINS)
    n = tl.load(bins + at)
    above = tl.sum(n, 0) - tl.cumsum(n, 0)
    wanted = tl.load(found + 1)
    is_it = (above < wanted) & (above + n >= wanted)
    leading = tl.load(found)
    tl.debug_barrier()  # all have read what is now overwritten
    tl.store(found, (leading << BITS) + tl.sum(tl.where(is_it, at, 0), 0))
    tl.store(found + 1, wanted - tl.sum(tl.where(is_it, above, 0), 0))


@triton.jit
def is_code(value, latent, bound, threshold, half_width, JUMP: tl.constexpr):
    """Which candidates are listed, their codes and their distances from the threshold; with JUMP codes may be 0."""
    if JUMP:
        over = value - tl.load(threshold + latent)
        listed = ((over <= 0.0) == 0) | (tl.abs(over) < half_width)
        code = tl.where(over <= 0.0, 0.0, value)
    else:
        key = key_of(value)
        over = value
        listed = (key > 0) & (key >= bound)
        code = value
    return listed, code, over


@triton.jit
def count_codes(
    value, latent, starts, ends, found, threshold, n_kept, half_width, JUMP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row: how many of its candidates are listed."""
    row = tl.program_id(0)
    start, end = tl.load(starts + row), tl.load(ends + row)
    bound = tl.load(found)
    n = 0
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_one = place < end
        each = tl.load(value + place, mask=is_one, other=0.0)
        which = tl.load(latent + place, mask=is_one, other=0)
        listed, _, _ = is_code(each, which, bound, threshold, half_width, JUMP)
        n += tl.sum((listed & is_one).to(tl.int32), 0)
    tl.store(n_kept + row, n)


@triton.jit
def list_codes(
    value,
    latent,
    starts,
    ends,
    found,
    threshold,
    begins,
    code,
    over,
    code_latent,
    code_row,
    capacity,
    half_width,
    JUMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: its codes in the order of its candidates, from begins[row] on."""
    row = tl.program_id(0)
    start, end = tl.load(starts + row), tl.load(ends + row)
    bound, to = tl.load(found), tl.load(begins + row)
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_one = place < end
        each = tl.load(value + place, mask=is_one, other=0.0)
        which = tl.load(latent + place, mask=is_one, other=0)
        listed, made, distance = is_code(each, which, bound, threshold, half_width, JUMP)
        listed = listed & is_one
        n = listed.to(tl.int32)
        at = to + tl.cumsum(n, 0) - n
        fits = listed & (at < capacity)
        tl.store(code + at, made, mask=fits)
        tl.store(over + at, distance, mask=fits)
        tl.store(code_latent + at, which, mask=fits)
        tl.store(code_row + at, tl.broadcast_to(row, (BLOCK,)), mask=fits)
        to += tl.sum(n, 0)


@triton.jit
def row_codes(value, latent, starts, ends, code, code_latent, code_row, n_kept, k, CANDIDATES: tl.constexpr):
    """One program a row: the k largest of its candidates, as far as they are positive, from row * k on.

    n_kept [n_rows]. Of equal ones the first are kept.
    """
    row = tl.program_id(0)
    start = tl.load(starts + row)
    place = start + tl.arange(0, CANDIDATES)
    is_one = place < tl.load(ends + row)
    each = tl.load(value + place, mask=is_one, other=0.0)
    which = tl.load(latent + place, mask=is_one, other=0)
    key = tl.where(is_one, key_of(each), 0)
    bound = 0
    for step in range(31):
        attempt = bound | (1 << (30 - step))
        enough = tl.sum((key >= attempt).to(tl.int32), 0) >= k
        bound = tl.where(enough, attempt, bound)
    above = key > bound
    equal = ((key == bound) & (key > 0)).to(tl.int32)
    keep = above | ((equal > 0) & (tl.cumsum(equal, 0) <= k - tl.sum(above.to(tl.int32), 0)))
    n = keep.to(tl.int32)
    at = row * k + tl.cumsum(n, 0) - n
    tl.store(code + at, each, mask=keep)
    tl.store(code_latent + at, which, mask=keep)
    tl.store(code_row + at, tl.broadcast_to(row, (CANDIDATES,)), mask=keep)
    tl.store(n_kept + row, tl.sum(n, 0))
