"""What the queries of a tile read, forwards and backwards: no tile needs another here, so all run side by side.

One program per batch row, head and tile of a group, from what `triton_advance.py` has left in scratch. The backward
half takes everything that needs no gradient of a later state; `triton_reverse.py` does the rest.
"""

import triton
import triton.language as tl

from .triton_math import activation, output, output_vjp
from .triton_tiles import (
    column_block,
    first_block,
    hidden_rows,
    last_block,
    load,
    load_norm,
    product,
    row_coefficients,
    square,
    token_rows,
    width_rows,
)


@triton.jit
def read_block(
    y, state, base, block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y base + β (y d) + f (y s)` for one block of a matrix."""
    beta, f = row_coefficients(rows, BLOCK)
    r = beta * product(y, load(state, block, mask).to(y.dtype), PRECISION)
    if HAS_MOMENTUM:
        r += f * product(y, load(state + MOMENTUM, block, mask).to(y.dtype), PRECISION)
    if HAS_BASE:
        r += product(y, load(base, block, mask).to(y.dtype), PRECISION)
    return r


@triton.jit
def read_block_vjp(
    y, cot, state, base, block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `read_block` for y, β and f."""
    beta, f = row_coefficients(rows, BLOCK)
    y = y.to(tl.float32)
    back = product(cot, tl.trans(load(state, block, mask).to(cot.dtype)), PRECISION)
    total = beta * back
    cot_beta = tl.sum(y * back, axis=1)
    cot_f = tl.zeros_like(cot_beta)
    if HAS_MOMENTUM:
        back = product(cot, tl.trans(load(state + MOMENTUM, block, mask).to(cot.dtype)), PRECISION)
        total += f * back
        cot_f = tl.sum(y * back, axis=1)
    if HAS_BASE:
        total += product(cot, tl.trans(load(base, block, mask).to(cot.dtype)), PRECISION)
    return total, cot_beta, cot_f


@triton.jit
def first_scores(queries, k, grad, at, inside, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """How much of each direction of the first layer each query finds."""
    keys = tl.load(k + at + tl.arange(0, BLOCK_D)[None, :], mask=inside, other=0.0)
    return (product(queries, tl.trans(keys), PRECISION) * tl.load(grad + square(BLOCK))).to(queries.dtype)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "programs"])
def read_kernel(
    q, k, grad, rows, base, weight, bias, states, x_rows, u_rows, u_last, out, y_rows, slope_rows, read, scores_kept,
    num_tokens, num_tiles, first, programs, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Outputs; or with KEEP, for the backward: queries' features and slopes there, last pre-activation, scores."""
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    LAST: tl.constexpr = (DEPTH - 1) * MATRIX
    MOMENTUM: tl.constexpr = DEPTH * MATRIX
    index = tl.program_id(0).to(tl.int64)
    program, tile = index % programs, first + index // programs
    states += index * ((2 if HAS_MOMENTUM else 1) * MOMENTUM)
    base += program % H * DEPTH * MATRIX
    hidden = index * BLOCK * HIDDEN
    series = program * DEPTH * num_tiles + tile
    last = series + (DEPTH - 1) * num_tiles
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
    inside = valid & (d_columns < WIDTH)
    queries = tl.load(q + at + d_columns, mask=inside, other=0.0)
    mixed = queries
    if DEPTH > 1:
        mixed = first_scores(queries, k, grad + series * BLOCK * BLOCK, at, inside, BLOCK, BLOCK_D, PRECISION)
    r = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            part = read_block(
                queries, states, base, block, mask, rows + series * 4 * BLOCK,
                MOMENTUM, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
            row += hidden
            part += product(mixed, tl.load(u_rows + row, mask=row_mask, other=0.0), PRECISION)
            y, slope, _ = activation(part, ACT)
            y = y.to(queries.dtype)
            if KEEP:
                tl.store(y_rows + row, y, mask=row_mask)
                tl.store(slope_rows + row, slope.to(y.dtype), mask=row_mask)
            x = tl.load(x_rows + row, mask=row_mask, other=0.0)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        r += read_block(
            y, states + LAST, base + LAST, block, mask, rows + last * 4 * BLOCK,
            MOMENTUM, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        # A branch that is always taken: products in one block of the program share the compiler's choice of layout,
        # and that of this small square one would make every warp repeat the others.
        if num_tiles > 0:
            scores += product(y, tl.trans(x), PRECISION)
    row, row_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
    row += index * BLOCK * WIDTH
    weighted = (scores * tl.load(grad + last * BLOCK * BLOCK + square(BLOCK))).to(queries.dtype)
    r += product(weighted, tl.load(u_last + row, mask=row_mask, other=0.0), PRECISION)
    if KEEP:
        tl.store(read + row, r, mask=row_mask)
        tl.store(scores_kept + index * BLOCK * BLOCK + square(BLOCK), scores)
    else:
        gamma, shift = load_norm(weight, bias, program % H, WIDTH, BLOCK_D, HAS_NORM)
        o = output(queries.to(tl.float32), r, gamma, shift, d_columns < WIDTH, eps, WIDTH, HAS_NORM)
        tl.store(out + at + d_columns, o.to(out.dtype.element_ty), mask=inside)


@triton.jit
def lower(x, BLOCK: tl.constexpr):
    t = tl.arange(0, BLOCK)
    return tl.where(t[:, None] >= t[None, :], x, 0.0)


@triton.jit
def output_gradients(
    cot, weight, bias, at, inside, row, row_mask, head, read, scores_kept, grad, u_last, eps,
    cot_norm, cot_r, cot_u_last, cot_grad,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the output and the last layer's scores, from what `read_kernel` kept.

    Returns the gradients of the last pre-activation and of the scores; stores those of norm, G and u.
    """
    d = tl.arange(0, BLOCK_D)
    gamma, _ = load_norm(weight, bias, head, WIDTH, BLOCK_D, HAS_NORM)
    r = tl.load(read + row, mask=row_mask, other=0.0)
    above = load(cot + at, d[None, :], inside)
    back, cot_gamma, cot_shift = output_vjp(r, above, gamma, (d < WIDTH)[None, :], eps, WIDTH, HAS_NORM)
    if HAS_NORM:
        tl.store(cot_norm + d, cot_gamma, mask=d < WIDTH)
        tl.store(cot_norm + WIDTH + d, cot_shift, mask=d < WIDTH)
    back = back.to(cot_r.dtype.element_ty)
    tl.store(cot_r + row, back, mask=row_mask)
    u = tl.load(u_last + row, mask=row_mask, other=0.0)
    g = tl.load(grad + square(BLOCK))
    scores = tl.load(scores_kept + square(BLOCK))
    tl.store(cot_u_last + row, product(tl.trans((scores * g).to(back.dtype)), back, PRECISION), mask=row_mask)
    cot_weights = product(back, tl.trans(u), PRECISION)
    tl.store(cot_grad + square(BLOCK), lower(cot_weights * scores, BLOCK))
    return back, (cot_weights * g).to(back.dtype)


@triton.jit
def last_reads_vjp(
    q, k, cot, at, valid, back_r, cot_scores, state, base, rows, x_rows, y_rows, r_rows, cot_q, cot_x, cot_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the last matrix: to the queries at depth 1, to the first pre-activations (`r_rows`) at depth 2."""
    t = tl.arange(0, BLOCK)
    cot_beta = tl.zeros([BLOCK], tl.float32)
    cot_f = tl.zeros([BLOCK], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            x = tl.load(x_rows + row, mask=row_mask, other=0.0)
            y = tl.load(y_rows + row, mask=row_mask, other=0.0)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        cot_y, part_beta, part_f = read_block_vjp(
            y, back_r, state, base, block, mask, rows, DEPTH * WIDTH * HIDDEN, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION
        )  # fmt: skip
        cot_beta += part_beta
        cot_f += part_f
        cot_y += product(cot_scores, x, PRECISION)
        tl.store(cot_x + row, product(tl.trans(cot_scores), y, PRECISION).to(x.dtype), mask=row_mask)
        if DEPTH == 1:
            if HAS_NORM:
                cot_y += column_block(cot, at, valid, j, HIDDEN, BLOCK_J).to(tl.float32)
            h = j + tl.arange(0, BLOCK_J)[None, :]
            tl.store(cot_q + at + h, cot_y.to(cot_q.dtype.element_ty), mask=valid & (h < HIDDEN))
        else:
            cot_y = cot_y * load(r_rows, row, row_mask)
            tl.store(r_rows + row, cot_y.to(x.dtype), mask=row_mask)
    tl.store(cot_rows + t, cot_beta)
    tl.store(cot_rows + BLOCK + t, cot_f)


@triton.jit
def first_reads_vjp(
    q, k, at, inside, grad, state, base, rows, u_rows, r_rows, cot_u, cot_k, row_of_k, mask_of_k, cot_rows, cot_grad,
    num_tiles,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the first of two matrices and its scores; returns the part of the queries."""
    t, d_columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)[None, :]
    queries = tl.load(q + at + d_columns, mask=inside, other=0.0)
    mixed = tl.trans(first_scores(queries, k, grad, at, inside, BLOCK, BLOCK_D, PRECISION))
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    cot_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    cot_beta = tl.zeros([BLOCK], tl.float32)
    cot_f = tl.zeros([BLOCK], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        cot_r = tl.load(r_rows + row, mask=row_mask, other=0.0)
        tl.store(cot_u + row, product(mixed, cot_r, PRECISION).to(cot_r.dtype), mask=row_mask)
        block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        queries = tl.load(q + at + d_columns, mask=inside, other=0.0)
        part, part_beta, part_f = read_block_vjp(
            queries, cot_r, state, base, block, mask, rows,
            2 * WIDTH * HIDDEN, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        total += part
        cot_beta += part_beta
        cot_f += part_f
        if num_tiles > 0:  # as in `read_kernel`
            u = tl.load(u_rows + row, mask=row_mask, other=0.0)
            cot_scores += product(cot_r, tl.trans(u), PRECISION)
    tl.store(cot_rows + t, cot_beta)
    tl.store(cot_rows + BLOCK + t, cot_f)
    queries = tl.load(q + at + d_columns, mask=inside, other=0.0)
    keys = tl.load(k + at + d_columns, mask=inside, other=0.0)
    part = lower(cot_scores * product(queries, tl.trans(keys), PRECISION), BLOCK)
    tl.store(cot_grad + square(BLOCK), part)
    cot_scores = (cot_scores * tl.load(grad + square(BLOCK))).to(keys.dtype)
    tl.store(cot_k + row_of_k, product(tl.trans(cot_scores), queries, PRECISION), mask=mask_of_k)
    return total + product(cot_scores, keys, PRECISION)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "programs"])
def read_backward_kernel(
    q, k, cot, grad, rows, base, weight, bias, states, x_rows, u_rows, u_last, y_rows, r_rows, read, scores_kept,
    cot_q, cot_grad, cot_rows, cot_norm, cot_x, cot_u, cot_r, cot_u_last, cot_k,
    num_tokens, num_tiles, first, programs, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries and of β, f and G; for the reverse walk those of x, u, r and the read's part of k."""
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    LAST: tl.constexpr = (DEPTH - 1) * MATRIX
    index = tl.program_id(0).to(tl.int64)
    program, tile = index % programs, first + index // programs
    states += index * ((2 if HAS_MOMENTUM else 1) * DEPTH * MATRIX)
    base += program % H * DEPTH * MATRIX
    series = program * DEPTH * num_tiles + tile
    last = series + (DEPTH - 1) * num_tiles
    hidden = index * BLOCK * HIDDEN
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
    inside = valid & (d_columns < WIDTH)
    width_row, width_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
    width_row += index * BLOCK * WIDTH
    back_r, cot_scores = output_gradients(
        cot, weight, bias, at, inside, width_row, width_mask, program % H, read, scores_kept + index * BLOCK * BLOCK,
        grad + last * BLOCK * BLOCK, u_last, eps, cot_norm + (program * num_tiles + tile) * 2 * WIDTH, cot_r,
        cot_u_last, cot_grad + last * BLOCK * BLOCK, WIDTH, BLOCK, BLOCK_D, HAS_NORM, PRECISION,
    )  # fmt: skip
    last_reads_vjp(
        q, k, cot, at, valid, back_r, cot_scores, states + LAST, base + LAST, rows + last * 4 * BLOCK,
        x_rows + hidden, y_rows + hidden, r_rows + hidden, cot_q, cot_x + hidden, cot_rows + last * 4 * BLOCK,
        DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_NORM, HAS_MOMENTUM, PRECISION,
    )  # fmt: skip
    if DEPTH > 1:
        tl.debug_barrier()
        total = first_reads_vjp(
            q, k, at, inside, grad + series * BLOCK * BLOCK, states, base, rows + series * 4 * BLOCK, u_rows + hidden,
            r_rows + hidden, cot_u + hidden, cot_k, width_row, width_mask, cot_rows + series * 4 * BLOCK,
            cot_grad + series * BLOCK * BLOCK, num_tiles,
            WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        if HAS_NORM:
            total += load(cot + at, d_columns, inside)
        tl.store(cot_q + at + d_columns, total.to(cot_q.dtype.element_ty), mask=inside)
