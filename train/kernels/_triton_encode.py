# type: ignore - the functions below are in Triton's language, whose types a checker of Python does not know
"""Triton: the encoder's product with the choice of candidates in its epilogue, and their list.

Of [batch, d_sae] pre-activations only those that reach a bound leave the chip. Each (row, tile of latents) has a fixed
number of slots and a count of its own, so no program waits for another and the same input gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def product_of(
    x,
    W,
    row,
    latent,
    is_row,
    is_latent,
    d_model,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[ROWS, LATENTS]: the products of rows of x and of W, both [n, d_model]."""
    product = tl.zeros((ROWS, LATENTS), tl.float32)
    of_row, of_latent = row.to(tl.int64)[:, None] * d_model, latent.to(tl.int64)[None, :] * d_model
    for start in range(0, d_model, DEPTH):
        at = start + tl.arange(0, DEPTH)
        if EVEN:
            left = tl.load(x + of_row + at[None, :], mask=is_row[:, None], other=0.0)
            right = tl.load(W + of_latent + at[:, None], mask=is_latent[None, :], other=0.0)
        else:
            inside = at < d_model
            left = tl.load(x + of_row + at[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
            right = tl.load(W + of_latent + at[:, None], mask=inside[:, None] & is_latent[None, :], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision=INPUT)
    return product


@triton.jit
def places(wanted, LATENTS: tl.constexpr):
    """How many are wanted before each, in its row: a product of zeros and ones, much faster than a scan."""
    at = tl.arange(0, LATENTS)
    return tl.dot(wanted.to(tl.float16), (at[:, None] < at[None, :]).to(tl.float16)).to(tl.int32)


@triton.jit
def candidates_of(
    x,
    W,
    b_enc,
    row_bound,
    latent_bound,
    chosen,
    n_chosen,
    values,
    latents,
    counts,
    n_rows,
    d_model,
    d_sae,
    n_tiles,
    AGAIN: tl.constexpr,
    BY_LATENT: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    INPUT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Candidates of x [n_rows, d_model] @ W [d_sae, d_model].T + b_enc, each row's by rising latent.

    values and latents [n_rows, n_tiles, SLOTS], counts [n_rows, n_tiles]; a count above SLOTS tells what did not fit.
    A candidate is positive and not below its row's bound, or not below its latent's bound; NaN is one always.
    AGAIN: only the first n_chosen [1] rows of those that `chosen` lists. WIDEN: the interpreter has no bfloat16.
    """
    program = tl.program_id(0)
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    tile = program // n_row_tiles  # rows go fastest: they stay in the cache while a tile of W passes once
    first = (program % n_row_tiles) * ROWS
    row = first + tl.arange(0, ROWS)
    latent = tile * LATENTS + tl.arange(0, LATENTS)
    is_row, is_latent = row < n_rows, latent < d_sae
    if AGAIN:
        n = tl.load(n_chosen).to(tl.int32)
        if first >= n:
            return
        is_row = row < n
        row = tl.load(chosen + row, mask=is_row, other=0).to(tl.int32)
    product = product_of(x, W, row, latent, is_row, is_latent, d_model, WIDEN, EVEN, INPUT, ROWS, LATENTS, DEPTH)
    pre = product + tl.load(b_enc + latent, mask=is_latent, other=0.0)[None, :]
    if BY_LATENT:
        wanted = (pre < tl.load(latent_bound + latent, mask=is_latent, other=0.0)[None, :]) == 0
    else:
        bound = tl.load(row_bound + row, mask=is_row, other=0.0)[:, None]
        wanted = ((pre < bound) | (pre <= 0.0)) == 0
    wanted = wanted & is_row[:, None] & is_latent[None, :]
    place = places(wanted, LATENTS)
    cell = row.to(tl.int64) * n_tiles + tile
    to = (cell * SLOTS)[:, None] + place
    fits = wanted & (place < SLOTS)
    tl.store(values + to, pre, mask=fits)
    tl.store(latents + to, tl.broadcast_to(latent[None, :], (ROWS, LATENTS)), mask=fits)
    tl.store(counts + cell, tl.sum(wanted.to(tl.int32), 1), mask=is_row)


@triton.jit
def list_candidates(
    values,
    latents,
    counts,
    starts,
    value,
    latent,
    row_of,
    n_tiles,
    capacity,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program a row: the slots [n_tiles, SLOTS] in use -> value, latent and row_of [capacity] from starts[row]."""
    row = tl.program_id(0)
    to = tl.load(starts + row)
    slot = tl.arange(0, SLOTS)
    for first in range(0, n_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        cell = row.to(tl.int64) * n_tiles + tile
        n = tl.load(counts + cell, mask=tile < n_tiles, other=0)
        n = tl.minimum(n, SLOTS)
        place = to + (tl.cumsum(n, 0) - n)[:, None] + slot[None, :]
        used = slot[None, :] < n[:, None]
        source = cell[:, None] * SLOTS + slot[None, :]
        fits = used & (place < capacity)
        tl.store(value + place, tl.load(values + source, mask=used, other=0.0), mask=fits)
        tl.store(latent + place, tl.load(latents + source, mask=used, other=0), mask=fits)
        tl.store(row_of + place, tl.broadcast_to(row, (TILES, SLOTS)), mask=fits)
        to += tl.sum(n, 0)


@triton.jit
def refine(x, W, b_enc, value, latent, row_of, total, d_model, capacity, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr):
    """Replace the candidates' values by exact dot products in float32: x [n_rows, d_model], W [d_sae, d_model]."""
    place = tl.program_id(0) * CANDIDATES + tl.arange(0, CANDIDATES)
    is_one = place < tl.minimum(tl.load(total), capacity)
    of_row = tl.load(row_of + place, mask=is_one, other=0).to(tl.int64)[:, None] * d_model
    chosen = tl.load(latent + place, mask=is_one, other=0)
    of_latent = chosen.to(tl.int64)[:, None] * d_model
    dot = tl.zeros((CANDIDATES,), tl.float32)
    for start in range(0, d_model, WIDTH):
        at = start + tl.arange(0, WIDTH)
        inside = is_one[:, None] & (at < d_model)[None, :]
        left = tl.load(x + of_row + at[None, :], mask=inside, other=0.0)
        right = tl.load(W + of_latent + at[None, :], mask=inside, other=0.0)
        dot += tl.sum(left * right, 1)
    tl.store(value + place, dot + tl.load(b_enc + chosen, mask=is_one, other=0.0), mask=is_one)
