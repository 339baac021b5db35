# type: ignore - the functions below are in Triton's language, whose types a checker of Python does not know
"""Triton: reconstruction, loss and the gradients of the codes, from one gather of decoder rows."""

import triton
import triton.language as tl


@triton.jit
def first_beyond(code_latent, start, end, bound, BLOCK: tl.constexpr):
    """The place in a row's codes, by rising latent, of the first whose latent is not below a bound."""
    n = 0
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        latent = tl.load(code_latent + place, mask=place < end, other=0)
        n += tl.sum(((latent < bound) & (place < end)).to(tl.int32), 0)
    return start + n


@triton.jit
def group_end(code_latent, begin, end, prefixes, GROUP: tl.constexpr, PREFIXES: tl.constexpr):
    """Where the codes of a group of latents end in a row's codes: those of the last with them."""
    stop = end
    if GROUP < PREFIXES - 1:
        stop = first_beyond(code_latent, begin, end, tl.load(prefixes + GROUP), 64)
    return stop


@triton.jit
def decoder_rows(W, code, code_latent, start, end, column, inside, width, CODES: tl.constexpr):
    """Codes [CODES] from a place on and the columns of their decoder rows [CODES, columns]."""
    place = start + tl.arange(0, CODES)
    is_one = place < end
    latent = tl.load(code_latent + place, mask=is_one, other=0).to(tl.int64)
    each = tl.load(code + place, mask=is_one, other=0.0)
    rows = tl.load(W + latent[:, None] * width + column[None, :], mask=is_one[:, None] & inside[None, :], other=0.0)
    return each, rows.to(tl.float32), place, is_one


@triton.jit
def decode(
    W,
    b_dec,
    target,
    begins,
    n_kept,
    code,
    code_latent,
    prefixes,
    reconstruction,
    pulls,
    errors,
    dots,
    n_rows,
    width,
    capacity,
    scale,
    PREFIXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program a row and block of columns. W [d_sae, width], target [n_rows, width], prefixes [PREFIXES].

    reconstruction [n_rows, width] from all latents. errors [n_blocks, n_rows]: squared, summed over prefixes.
    pulls [n_rows, PREFIXES, width]: the loss's gradient in what the latents of each group add: all prefixes from
    theirs on have them. dots [n_blocks, capacity]: the codes' gradients by block. The rows' second turn is from cache.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    at = row.to(tl.int64) * width + column
    begin = tl.load(begins + row)
    end = tl.minimum(begin + tl.load(n_kept + row), capacity)
    offset = tl.load(b_dec + column, mask=inside, other=0.0)
    wanted = tl.load(target + at, mask=inside, other=0.0)
    made, all_residuals, squares, start = offset, tl.zeros((COLUMNS,), tl.float32), 0.0, begin
    for group in tl.static_range(PREFIXES):
        stop = group_end(code_latent, begin, end, prefixes, group, PREFIXES)
        for first in range(start, stop, CODES):
            each, rows, _, _ = decoder_rows(W, code, code_latent, first, stop, column, inside, width, CODES)
            made += tl.sum(each[:, None] * rows, 0)
        residual = tl.where(inside, wanted - made, 0.0)
        squares += tl.sum(residual * residual, 0)
        all_residuals += residual
        start = stop
    tl.store(reconstruction + at, made, mask=inside)
    tl.store(errors + block * n_rows + row, squares)
    made, seen, start = offset, tl.zeros((COLUMNS,), tl.float32), begin
    for group in tl.static_range(PREFIXES):
        stop = group_end(code_latent, begin, end, prefixes, group, PREFIXES)
        pull = -scale * (all_residuals - seen)
        tl.store(pulls + (row.to(tl.int64) * PREFIXES + group) * width + column, pull, mask=inside)
        for first in range(start, stop, CODES):
            each, rows, place, is_one = decoder_rows(W, code, code_latent, first, stop, column, inside, width, CODES)
            tl.store(dots + block.to(tl.int64) * capacity + place, tl.sum(rows * pull[None, :], 1), mask=is_one)
            if group < PREFIXES - 1:
                made += tl.sum(each[:, None] * rows, 0)
        if group < PREFIXES - 1:
            seen += tl.where(inside, wanted - made, 0.0)
        start = stop
