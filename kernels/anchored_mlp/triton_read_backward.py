"""Back through the reads of a tile: everything that needs no gradient of a later state. Tiles run side by side.

From what `triton_read.py` has kept; `triton_reverse.py` goes on with the gradients left in scratch.
"""

from functools import partial

import triton
import triton.language as tl

from .triton_entries import entries
from .triton_math import output_vjp
from .triton_read import first_scores
from .triton_tiles import (
    COT_K,
    COT_R,
    COT_U,
    COT_U_LAST,
    COT_X,
    READ,
    U_LAST,
    R,
    U,
    X,
    Y,
    column_block,
    first_block,
    hidden_rows,
    last_block,
    load,
    load_float,
    load_norm,
    load_tokens,
    product,
    row_coefficients,
    scratch_of,
    square,
    store_tokens,
    token_rows,
    width_rows,
)


@triton.jit
def read_block_vjp(
    y, cot, block, base_block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `read_block` for y, β and f."""
    beta, f = row_coefficients(rows, BLOCK)
    y = y.to(tl.float32)
    back = product(cot, tl.trans(load(block, mask).to(cot.dtype)), PRECISION)
    total = beta * back
    cot_beta = tl.sum(y * back, axis=1)
    cot_f = tl.zeros_like(cot_beta)
    if HAS_MOMENTUM:
        back = product(cot, tl.trans(load(block + MOMENTUM, mask).to(cot.dtype)), PRECISION)
        total += f * back
        cot_f = tl.sum(y * back, axis=1)
    if HAS_BASE:
        total += product(cot, tl.trans(load(base_block, mask).to(cot.dtype)), PRECISION)
    return total, cot_beta, cot_f


@triton.jit
def lower(x, BLOCK: tl.constexpr):
    t = tl.arange(0, BLOCK)
    return tl.where(t[:, None] >= t[None, :], x, 0.0)


@triton.jit
def output_gradients(
    cot, weight, bias, at, valid, head, lines, sums, scores_kept, grad, eps, cot_norm, cot_grad,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the output and the last layer's scores.

    Returns the gradients of the last pre-activations and of the scores; stores those of norm, G and u.
    """
    d = tl.arange(0, BLOCK_D)
    gamma, _ = load_norm(weight, bias, head, WIDTH, BLOCK_D, HAS_NORM)
    row, mask = width_rows(sums, READ, WIDTH, BLOCK, BLOCK_D)
    above = load_tokens(cot, at, valid, WIDTH, BLOCK_D).to(tl.float32)
    back, cot_gamma, cot_shift = output_vjp(load(row, mask), above, gamma, (d < WIDTH)[None, :], eps, WIDTH, HAS_NORM)
    if HAS_NORM:
        tl.store(cot_norm + d, cot_gamma, mask=d < WIDTH)
        tl.store(cot_norm + WIDTH + d, cot_shift, mask=d < WIDTH)
    back = back.to(lines.dtype.element_ty)
    row, mask = width_rows(lines, COT_R, WIDTH, BLOCK, BLOCK_D)
    tl.store(row, back, mask=mask)
    g = tl.load(grad + square(BLOCK))
    scores = tl.load(scores_kept + square(BLOCK))
    row, mask = width_rows(sums, COT_U_LAST, WIDTH, BLOCK, BLOCK_D)
    tl.store(row, product(tl.trans((scores * g).to(back.dtype)), back, PRECISION), mask=mask)
    row, mask = width_rows(lines, U_LAST, WIDTH, BLOCK, BLOCK_D)
    cot_weights = product(back, tl.trans(load(row, mask)), PRECISION)
    tl.store(cot_grad + square(BLOCK), lower(cot_weights * scores, BLOCK))
    return back, (cot_weights * g).to(back.dtype)


@triton.jit
def last_reads_vjp(
    q, k, cot, at, valid, cot_r, cot_scores, state, base, rows, wide, cot_q, cot_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the last matrix: to the queries at depth 1, to their first pre-activations at depth 2."""
    t = tl.arange(0, BLOCK)
    cot_beta = tl.zeros([BLOCK], tl.float32)
    cot_f = tl.zeros([BLOCK], tl.float32)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            row, mask = hidden_rows(wide, X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            x = load(row, mask)
            row, mask = hidden_rows(wide, Y, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            y = load(row, mask)
        block, mask = last_block(state, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        base_block, _ = last_block(base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        cot_y, part_beta, part_f = read_block_vjp(
            y, cot_r, block, base_block, mask, rows, DEPTH * WIDTH * HIDDEN, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION
        )  # fmt: skip
        cot_beta += part_beta
        cot_f += part_f
        cot_y += product(cot_scores, x, PRECISION)
        row, mask = hidden_rows(wide, COT_X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        tl.store(row, product(tl.trans(cot_scores), y, PRECISION).to(x.dtype), mask=mask)
        if DEPTH == 1:
            if HAS_NORM:
                cot_y += column_block(cot, at, valid, j, HIDDEN, BLOCK_J).to(tl.float32)
            h = j + tl.arange(0, BLOCK_J)[None, :]
            tl.store(cot_q + at + h, cot_y.to(cot_q.dtype.element_ty), mask=valid & (h < HIDDEN))
        else:
            row, mask = hidden_rows(wide, R, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            tl.store(row, (cot_y * load_float(row, mask)).to(x.dtype), mask=mask)
    tl.store(cot_rows + t, cot_beta)
    tl.store(cot_rows + BLOCK + t, cot_f)


@triton.jit
def first_scores_vjp(
    q, k, at, valid, grad, wide, sums, cot_grad, num_tiles,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the scores of the first of two layers, to U, G and the keys; returns the part of the queries."""
    queries = load_tokens(q, at, valid, WIDTH, BLOCK_D)
    mixed = tl.trans(first_scores(queries, load_tokens(k, at, valid, WIDTH, BLOCK_D), grad, BLOCK, PRECISION))
    cot_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        row, mask = hidden_rows(wide, R, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        cot_r = load(row, mask)
        row, _ = hidden_rows(wide, COT_U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        tl.store(row, product(mixed, cot_r, PRECISION).to(cot_r.dtype), mask=mask)
        if num_tiles > 0:  # as in `read_kernel`
            row, _ = hidden_rows(wide, U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            cot_scores += product(cot_r, tl.trans(load(row, mask)), PRECISION)
    queries = load_tokens(q, at, valid, WIDTH, BLOCK_D)
    keys = load_tokens(k, at, valid, WIDTH, BLOCK_D)
    part = lower(cot_scores * product(queries, tl.trans(keys), PRECISION), BLOCK)
    tl.store(cot_grad + square(BLOCK), part)
    cot_scores = (cot_scores * tl.load(grad + square(BLOCK))).to(keys.dtype)
    line, line_mask = width_rows(sums, COT_K, WIDTH, BLOCK, BLOCK_D)
    tl.store(line, product(tl.trans(cot_scores), queries, PRECISION), mask=line_mask)
    return product(cot_scores, keys, PRECISION)


@triton.jit
def first_reads_vjp(
    q, at, valid, total, state, base, rows, wide, cot_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the first of two matrices; adds to `total`, the gradients of the queries."""
    t = tl.arange(0, BLOCK)
    cot_beta = tl.zeros([BLOCK], tl.float32)
    cot_f = tl.zeros([BLOCK], tl.float32)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        row, row_mask = hidden_rows(wide, R, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        block, mask = first_block(state, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        base_block, _ = first_block(base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        # Loaded again in each round: kept as float32 they would fill the registers.
        queries = load_tokens(q, at, valid, WIDTH, BLOCK_D)
        part, part_beta, part_f = read_block_vjp(
            queries, load(row, row_mask), block, base_block, mask, rows,
            2 * WIDTH * HIDDEN, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        total += part
        cot_beta += part_beta
        cot_f += part_f
    tl.store(cot_rows + t, cot_beta)
    tl.store(cot_rows + BLOCK + t, cot_f)
    return total


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "programs"])
def read_backward_kernel(
    q, k, cot, grad, rows, base, weight, bias, states, wide, narrow, sums, scores_kept, cot_q, cot_grad, cot_rows,
    cot_norm, num_tokens, num_tiles, first, programs, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries and of β, f and G; in scratch those of X, U, the first pre-activations and the keys."""
    index = tl.program_id(0).to(tl.int64)
    program, tile = index % programs, first + index // programs
    states += index * ((2 if HAS_MOMENTUM else 1) * DEPTH * WIDTH * HIDDEN)
    base += program % H * DEPTH * WIDTH * HIDDEN
    planes, lines = scratch_of(index, wide, narrow, DEPTH, HIDDEN, WIDTH, BLOCK, True)
    sums += index * 4 * BLOCK * WIDTH
    series = program * DEPTH * num_tiles + tile
    last = series + (DEPTH - 1) * num_tiles
    at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
    cot_r, cot_scores = output_gradients(
        cot, weight, bias, at, valid, program % H, lines, sums, scores_kept + index * BLOCK * BLOCK,
        grad + last * BLOCK * BLOCK, eps, cot_norm + (program * num_tiles + tile) * 2 * WIDTH,
        cot_grad + last * BLOCK * BLOCK, WIDTH, BLOCK, BLOCK_D, HAS_NORM, PRECISION,
    )  # fmt: skip
    last_reads_vjp(
        q, k, cot, at, valid, cot_r, cot_scores, states, base, rows + last * 4 * BLOCK, planes, cot_q,
        cot_rows + last * 4 * BLOCK,
        DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_NORM, HAS_MOMENTUM, PRECISION,
    )  # fmt: skip
    if DEPTH > 1:
        tl.debug_barrier()
        total = first_scores_vjp(
            q, k, at, valid, grad + series * BLOCK * BLOCK, planes, sums, cot_grad + series * BLOCK * BLOCK, num_tiles,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, PRECISION,
        )  # fmt: skip
        total = first_reads_vjp(
            q, at, valid, total, states, base, rows + series * 4 * BLOCK, planes, cot_rows + series * 4 * BLOCK,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        if HAS_NORM:
            total += load_tokens(cot, at, valid, WIDTH, BLOCK_D).to(tl.float32)
        store_tokens(cot_q, at, valid, total, WIDTH, BLOCK_D)


compile_entries = partial(entries, {"read_backward": (read_backward_kernel, True)})
