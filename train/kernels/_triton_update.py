# type: ignore - the functions below are in Triton's language, whose types a checker of Python does not know
"""Triton: sums over the codes of each latent, and Adam with all that goes with it in one pass over the weights.

The clip needs the length of the whole gradient before the first weight moves. So gradients are written once and read
once: 16 bytes a weight of those latents that have any, against a second gather of every code's row, which costs
more as soon as a latent has two codes in a batch.
"""

import triton
import triton.language as tl


@triton.jit
def latent_sums(
    order,
    segments,
    code,
    over,
    of_code,
    sums,
    near_sums,
    n_near,
    n_on,
    half_width,
    JUMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a latent, over its codes in the order of rows. segments [d_sae + 1] into order.

    sums: the gradient of b_enc; n_on: codes that are positive. With JUMP near_sums and n_near: the gradients
    of codes in the threshold's window, and how many there are on its upper side.
    """
    latent = tl.program_id(0)
    start, end = tl.load(segments + latent), tl.load(segments + latent + 1)
    total, near_total, n_above, n_positive = 0.0, 0.0, 0, 0
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        is_one = at < end
        place = tl.load(order + at, mask=is_one, other=0)
        each = tl.load(code + place, mask=is_one, other=0.0)
        pull = tl.load(of_code + place, mask=is_one, other=0.0)
        if JUMP:
            distance = tl.load(over + place, mask=is_one, other=0.0)
            near = is_one & (tl.abs(distance) < half_width)
            near_total += tl.sum(tl.where(near, pull, 0.0), 0)
            n_above += tl.sum((near & (distance > 0.0)).to(tl.int32), 0)
            pull = tl.where(distance > 0.0, pull, 0.0)
        total += tl.sum(pull, 0)
        n_positive += tl.sum((is_one & (each > 0.0)).to(tl.int32), 0)
    tl.store(sums + latent, total)
    tl.store(n_on + latent, n_positive)
    if JUMP:
        tl.store(near_sums + latent, near_total)
        tl.store(n_near + latent, n_above)


@triton.jit
def gradient_rows(
    weight,
    row_of,
    segments,
    table,
    W,
    prefixes,
    gradient,
    lengths,
    along,
    own_lengths,
    d_sae,
    width,
    DECODER: tl.constexpr,
    PREFIXES: tl.constexpr,
    PREFIXES_2: tl.constexpr,
    COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program a latent and block of columns: sums of table [n_rows, PREFIXES, width] by weight.

    weight and row_of [capacity] are by latent, each's from segments[latent] to the next.

    gradient [d_sae, width], only for latents with codes; and by block and latent [n_blocks, d_sae] what the clip and
    the projection need: the squared lengths of gradients, and for the DECODER their products with W's rows and
    the rows' own squared lengths.
    """
    latent, block = tl.program_id(0), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    start, end = tl.load(segments + latent), tl.load(segments + latent + 1)
    at = latent.to(tl.int64) * width + column
    stat = block * d_sae + latent
    own = tl.zeros((COLUMNS,), tl.float32)
    group = 0
    if DECODER:
        own = tl.load(W + at, mask=inside, other=0.0)
        tl.store(own_lengths + stat, tl.sum(own * own, 0))
        each = tl.arange(0, PREFIXES_2)
        group = tl.sum((latent >= tl.load(prefixes + each, mask=each < PREFIXES - 1, other=d_sae)).to(tl.int32), 0)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(start, end, CODES):
        which = first + tl.arange(0, CODES)
        is_one = which < end
        row = tl.load(row_of + which, mask=is_one, other=0).to(tl.int64)
        share = tl.load(weight + which, mask=is_one, other=0.0)
        source = (row * PREFIXES + group)[:, None] * width + column[None, :]
        rows = tl.load(table + source, mask=is_one[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(share[:, None] * rows, 0)
    if end > start:
        tl.store(gradient + at, total, mask=inside)
    tl.store(lengths + stat, tl.sum(total * total, 0))
    if DECODER:
        tl.store(along + stat, tl.sum(total * own, 0))


@triton.jit
def adam(weight, mean, square, gradient, numbers, beta1, new1, beta2, new2, eps):
    """New weight, mean and square, by torch's formula. numbers: the step's size and the root of the 2nd correction.

    new1 and new2 are 1 - beta1 and 1 - beta2, which in float32 would lose digits.
    """
    mean = beta1 * mean + new1 * gradient
    square = beta2 * square + new2 * gradient * gradient
    step = tl.load(numbers) * mean / (tl.sqrt(square) / tl.load(numbers + 1) + eps)
    return weight - step, mean, square


@triton.jit
def adam_rows(
    W,
    means,
    squares,
    gradient,
    has_gradient,
    share_along,
    clip,
    numbers,
    shadow,
    width,
    beta1,
    new1,
    beta2,
    new2,
    eps,
    UNIT: tl.constexpr,
    SHADOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a latent: its row of W [d_sae, width], of the moments and of the shadow in bfloat16.

    With UNIT the gradient loses share_along [d_sae] times the row, and the row gets length 1 again.
    """
    latent = tl.program_id(0)
    start = latent.to(tl.int64) * width
    known = tl.where(tl.load(has_gradient + latent) > 0, width, 0)  # columns of the gradient that are there
    factor = tl.load(clip)
    squared_length = 0.0
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < width
        at = start + column
        pull = tl.load(gradient + at, mask=column < known, other=0.0)
        weight = tl.load(W + at, mask=inside, other=0.0)
        if UNIT:
            pull -= tl.load(share_along + latent) * weight
        mean, square = tl.load(means + at, mask=inside, other=0.0), tl.load(squares + at, mask=inside, other=0.0)
        weight, mean, square = adam(weight, mean, square, pull * factor, numbers, beta1, new1, beta2, new2, eps)
        tl.store(means + at, mean, mask=inside)
        tl.store(squares + at, square, mask=inside)
        tl.store(W + at, weight, mask=inside)
        squared_length += tl.sum(tl.where(inside, weight * weight, 0.0), 0)
        if SHADOW and not UNIT:
            tl.store(shadow + at, weight.to(tl.bfloat16), mask=inside)
    if UNIT:
        tl.debug_barrier()  # what other threads have stored is read below
        length = tl.sqrt(squared_length)
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = column < width
            weight = tl.load(W + start + column, mask=inside, other=0.0) / length
            tl.store(W + start + column, weight, mask=inside)
            if SHADOW:
                tl.store(shadow + start + column, weight.to(tl.bfloat16), mask=inside)


@triton.jit
def adam_vector(vector, means, squares, gradient, clip, numbers, n, beta1, new1, beta2, new2, eps, BLOCK: tl.constexpr):
    """Adam on a block of a vector [n]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    pull = tl.load(gradient + at, mask=inside, other=0.0) * tl.load(clip)
    weight = tl.load(vector + at, mask=inside, other=0.0)
    mean, square = tl.load(means + at, mask=inside, other=0.0), tl.load(squares + at, mask=inside, other=0.0)
    weight, mean, square = adam(weight, mean, square, pull, numbers, beta1, new1, beta2, new2, eps)
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, square, mask=inside)
    tl.store(vector + at, weight, mask=inside)
