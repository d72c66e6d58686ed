"""Backward through the reads of a tile: all that needs no gradient of a later state, tiles in parallel.

One program per batch row, head and tile of a group, from the states in front of the tiles (`states`). What the walk
backwards (`triton_reverse.py`) needs of it goes to scratch.
"""

import triton
import triton.language as tl

from .triton_math import activation, descent, output_vjp
from .triton_tiles import (
    column_block,
    first_block,
    hidden_rows,
    last_block,
    load,
    load_memory,
    load_norm,
    load_state,
    product,
    read_running,
    row_coefficients,
    square,
    token_rows,
    width_rows,
)


@triton.jit
def first_directions(
    keys, u_last, state, base, j,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr,
    HAS_BASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of the keys, and descent directions, of one hidden block of the first of two layers."""
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    dtype = keys.dtype
    block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    m = load_memory(state, base, block, mask, HAS_BASE)
    x, slope, _ = activation(product(keys, m.to(dtype), PRECISION), ACT)
    block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    m = load_memory(state + MATRIX, base + MATRIX, block, mask, HAS_BASE)
    return x.to(dtype), (product(u_last, tl.trans(m.to(dtype)), PRECISION) * slope).to(dtype)


@triton.jit
def first_read(
    keys, queries, u_last, mixed, state, base, rows, y_rows, slope_rows, j,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
    ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of keys and queries; the latter, and the slopes there, are kept."""
    dtype = keys.dtype
    x, u = first_directions(
        keys, u_last, state, base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, ACT, HAS_BASE, PRECISION
    )  # fmt: skip
    block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    d, s, w = load_state(state, base, block, mask, 2 * WIDTH * HIDDEN, HAS_BASE, HAS_MOMENTUM)
    beta, f, _, _ = row_coefficients(rows, BLOCK)
    r = read_running(queries, d, s, w, beta, f, HAS_BASE, HAS_MOMENTUM, PRECISION)
    y, slope, _ = activation(r + product(mixed, u, PRECISION), ACT)
    y = y.to(dtype)
    block, mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
    tl.store(y_rows + block, y, mask=mask)
    tl.store(slope_rows + block, slope.to(dtype), mask=mask)
    return x, y


@triton.jit
def last_read(
    q, k, at, valid, keys, queries, u, mixed, state, base, rows, last_rows, y_rows, slope_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Last pre-activation of the read, without what the tile itself adds, and the scores that add it."""
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    r = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            x, y = first_read(
                keys, queries, u, mixed, state, base, rows, y_rows, slope_rows, j,
                WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        d, s, w = load_state(state + LAST, base + LAST, block, mask, DEPTH * WIDTH * HIDDEN, HAS_BASE, HAS_MOMENTUM)
        beta, f, _, _ = row_coefficients(last_rows, BLOCK)
        r += read_running(y, d, s, w, beta, f, HAS_BASE, HAS_MOMENTUM, PRECISION)
        scores += product(y, tl.trans(x), PRECISION)
    return r, scores


@triton.jit
def running_vjp(
    cot, d, s, w, beta, f, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradients of `read_running` for y; and what gives those of β and f when summed over y."""
    dtype = cot.dtype
    back_d = product(cot, tl.trans(d.to(dtype)), PRECISION)
    back_s = back_d
    back = beta * back_d
    if HAS_MOMENTUM:
        back_s = product(cot, tl.trans(s.to(dtype)), PRECISION)
        back += f * back_s
    if HAS_BASE:
        back += product(cot, tl.trans(w.to(dtype)), PRECISION)
    return back, back_d, back_s


@triton.jit
def first_read_vjp(
    keys, queries, u_last, cot_y, mixed, state, base, rows, r_rows, cot_u, j,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
    ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of one block of the queries' features to those of queries, scores, β and f of the first layer.

    `r_rows` holds the slopes before, the gradients of the pre-activations after; `cot_u` gets those of the directions.
    """
    dtype = keys.dtype
    _, u = first_directions(keys, u_last, state, base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, ACT, HAS_BASE, PRECISION)
    block, mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
    cot_r = (cot_y * load(r_rows, block, mask)).to(dtype)
    tl.store(r_rows + block, cot_r, mask=mask)
    tl.store(cot_u + block, product(tl.trans(mixed), cot_r, PRECISION), mask=mask)
    block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    d, s, w = load_state(state, base, block, mask, 2 * WIDTH * HIDDEN, HAS_BASE, HAS_MOMENTUM)
    beta, f, _, _ = row_coefficients(rows, BLOCK)
    back, back_d, back_s = running_vjp(cot_r, d, s, w, beta, f, HAS_BASE, HAS_MOMENTUM, PRECISION)
    y = queries.to(tl.float32)
    return back, product(cot_r, tl.trans(u), PRECISION), tl.sum(y * back_d, axis=1), tl.sum(y * back_s, axis=1)


@triton.jit
def reads_vjp(
    q, k, cot, at, valid, keys, queries, u, mixed, cot_scores, cot_r, state, base, rows, last_rows, y_rows, r_rows,
    cot_q, cot_x, cot_u, cot_rows, cot_last_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second sweep: gradients of the queries and of the first layer's scores at depth 2; at depth 1 `cot_q` is done."""
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    t = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    cot_mixed = tl.zeros([BLOCK, BLOCK], tl.float32)
    cot_beta = tl.zeros([BLOCK], tl.float32)
    cot_f = tl.zeros([BLOCK], tl.float32)
    cot_beta_last = tl.zeros([BLOCK], tl.float32)
    cot_f_last = tl.zeros([BLOCK], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            x, _ = first_directions(
                keys, u, state, base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, ACT, HAS_BASE, PRECISION
            )  # fmt: skip
            y = tl.load(y_rows + row, mask=row_mask, other=0.0)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        d, s, w = load_state(state + LAST, base + LAST, block, mask, DEPTH * WIDTH * HIDDEN, HAS_BASE, HAS_MOMENTUM)
        beta, f, _, _ = row_coefficients(last_rows, BLOCK)
        cot_y, back_d, back_s = running_vjp(cot_r, d, s, w, beta, f, HAS_BASE, HAS_MOMENTUM, PRECISION)
        cot_y += product(cot_scores, x, PRECISION)
        cot_beta_last += tl.sum(y.to(tl.float32) * back_d, axis=1)
        cot_f_last += tl.sum(y.to(tl.float32) * back_s, axis=1)
        tl.store(cot_x + row, product(tl.trans(cot_scores), y, PRECISION), mask=row_mask)
        if DEPTH == 1:
            h = j + tl.arange(0, BLOCK_J)[None, :]
            if HAS_NORM:
                cot_y += column_block(cot, at, valid, j, HIDDEN, BLOCK_J).to(tl.float32)
            tl.store(cot_q + at + h, cot_y.to(cot_q.dtype.element_ty), mask=valid & (h < HIDDEN))
        else:
            back, part, part_beta, part_f = first_read_vjp(
                keys, queries, u, cot_y, mixed, state, base, rows, r_rows, cot_u, j,
                WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            total += back
            cot_mixed += part
            cot_beta += part_beta
            cot_f += part_f
    tl.store(cot_last_rows + t, cot_beta_last)
    tl.store(cot_last_rows + BLOCK + t, cot_f_last)
    if DEPTH > 1:
        tl.store(cot_rows + t, cot_beta)
        tl.store(cot_rows + BLOCK + t, cot_f)
    return total, cot_mixed


@triton.jit
def lower(x, BLOCK: tl.constexpr):
    t = tl.arange(0, BLOCK)
    return tl.where(t[:, None] >= t[None, :], x, 0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "programs"])
def reads_kernel(
    q, k, v, cot, grad, rows, base, weight, bias, states, preactivation,
    cot_q, cot_grad, cot_rows, cot_norm, y_rows, r_rows, cot_x, cot_u, cot_r, cot_u_last, cot_k,
    num_tokens, num_tiles, first, programs, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles first, first + 1, ... of every row and head; scratch is `[tiles of the group, B, H, BLOCK, ...]`."""
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    index = tl.program_id(0).to(tl.int64)
    program, tile = index % programs, first + index // programs
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    inside = d_columns < WIDTH
    at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
    row, row_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
    row += index * BLOCK * WIDTH
    y_rows += index * BLOCK * HIDDEN
    r_rows += index * BLOCK * HIDDEN
    states += index * ((2 if HAS_MOMENTUM else 1) * DEPTH * MATRIX)
    base += program % H * DEPTH * MATRIX
    series = program * DEPTH * num_tiles + tile
    last = series + (DEPTH - 1) * num_tiles
    gamma, shift = load_norm(weight, bias, program % H, WIDTH, BLOCK_D, HAS_NORM)

    keys = tl.load(k + at + d_columns, mask=valid & inside, other=0.0)
    queries = tl.load(q + at + d_columns, mask=valid & inside, other=0.0)
    dtype = keys.dtype
    z = tl.load(preactivation + row, mask=row_mask, other=0.0)
    values = load(v + at, d_columns, valid & inside)
    u = descent(z, keys.to(tl.float32), values, gamma, shift, inside, eps, WIDTH, HAS_NORM).to(dtype)
    mixed = keys
    if DEPTH > 1:
        g = tl.load(grad + series * BLOCK * BLOCK + square(BLOCK))
        mixed = (product(queries, tl.trans(keys), PRECISION) * g).to(dtype)
    r, scores = last_read(
        q, k, at, valid, keys, queries, u, mixed, states, base, rows + series * 4 * BLOCK, rows + last * 4 * BLOCK,
        y_rows, r_rows,
        DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_MOMENTUM, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()

    g = tl.load(grad + last * BLOCK * BLOCK + square(BLOCK))
    weighted = (scores * g).to(dtype)
    r += product(weighted, u, PRECISION)
    above = load(cot + at, d_columns, valid & inside)
    back, cot_gamma, cot_shift = output_vjp(r, above, gamma, inside, eps, WIDTH, HAS_NORM)
    back = back.to(dtype)
    if HAS_NORM:
        norm_at = cot_norm + (program * num_tiles + tile) * 2 * WIDTH + tl.arange(0, BLOCK_D)
        tl.store(norm_at, cot_gamma, mask=tl.arange(0, BLOCK_D) < WIDTH)
        tl.store(norm_at + WIDTH, cot_shift, mask=tl.arange(0, BLOCK_D) < WIDTH)
    tl.store(cot_r + row, back, mask=row_mask)
    tl.store(cot_u_last + row, product(tl.trans(weighted), back, PRECISION), mask=row_mask)
    cot_weights = product(back, tl.trans(u), PRECISION)
    tl.store(cot_grad + last * BLOCK * BLOCK + square(BLOCK), lower(cot_weights * scores, BLOCK))
    total, cot_mixed = reads_vjp(
        q, k, cot, at, valid, keys, queries, u, mixed, (cot_weights * g).to(dtype), back, states, base,
        rows + series * 4 * BLOCK, rows + last * 4 * BLOCK, y_rows, r_rows,
        cot_q, cot_x + index * BLOCK * HIDDEN, cot_u + index * BLOCK * HIDDEN,
        cot_rows + series * 4 * BLOCK, cot_rows + last * 4 * BLOCK,
        DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_NORM, HAS_MOMENTUM, PRECISION,
    )  # fmt: skip
    if DEPTH > 1:
        keys_scores = product(queries, tl.trans(keys), PRECISION)
        tl.store(cot_grad + series * BLOCK * BLOCK + square(BLOCK), lower(cot_mixed * keys_scores, BLOCK))
        cot_scores = (cot_mixed * tl.load(grad + series * BLOCK * BLOCK + square(BLOCK))).to(dtype)
        total += product(cot_scores, keys, PRECISION)
        if HAS_NORM:
            total += load(cot + at, d_columns, valid & inside)
        tl.store(cot_q + at + d_columns, total.to(cot_q.dtype.element_ty), mask=valid & inside)
        tl.store(cot_k + row, product(tl.trans(cot_scores), queries, PRECISION), mask=row_mask)
