"""The walk over tiles: gradients at the tile's start, folded into the state behind it. Nothing is read here.

This is the serial chain, so it is kept short: one program per batch row and head, and everything that a query needs
(`triton_read.py`) is left in scratch, to be read by all tiles of a group at once. Tile i finds its state in `states[i]`
and writes `states[i + 1]`, float32.
"""

import triton
import triton.language as tl

from .triton_math import activation, descent
from .triton_tiles import (
    column_block,
    first_block,
    hidden_rows,
    last_block,
    load,
    load_memory,
    load_norm,
    product,
    row_coefficients,
    token_rows,
    width_rows,
)


@triton.jit
def last_preactivation(
    k, at, valid, keys, state, base, x_rows, slope_rows, bend_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What the last matrix makes of the keys; at depth 2 their features, and the derivatives there, go to scratch."""
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    dtype = keys.dtype
    z = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
        else:
            block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            m = load_memory(state, base, block, mask, HAS_BASE).to(dtype)
            x, slope, curvature = activation(product(keys, m, PRECISION), ACT)
            x = x.to(dtype)
            row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
            tl.store(x_rows + row, x, mask=row_mask)
            tl.store(slope_rows + row, slope.to(dtype), mask=row_mask)
            if KEEP:
                tl.store(bend_rows + row, curvature.to(dtype), mask=row_mask)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        z += product(x, load_memory(state + LAST, base + LAST, block, mask, HAS_BASE).to(dtype), PRECISION)
    return z


@triton.jit
def fold_block(
    x, u, state, after, block, mask, rows, ends,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`d' = β d + f s + Σ G_s x_sᵀ u_s` and `s' = m s + Σ N_s x_sᵀ u_s` of one block."""
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    d = tl.load(ends) * load(state, block, mask)
    if HAS_MOMENTUM:
        s = load(state + MOMENTUM, block, mask)
        d += tl.load(ends + 1) * s
        s = tl.load(ends + 2) * s + product(tl.trans((write_momentum * x).to(u.dtype)), u, PRECISION)
        tl.store(after + MOMENTUM + block, s, mask=mask)
    tl.store(after + block, d + product(tl.trans((write * x).to(u.dtype)), u, PRECISION), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "count"])
def advance_kernel(
    k, v, rows, ends, base, weight, bias, states, x_rows, u_rows, slope_rows, bend_rows, u_last, preactivation,
    num_tokens, num_tiles, first, count, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Tiles first, ..., first + count - 1 of every row and head, from `states[0]`; scratch of tile i lies at i.

    With KEEP, for the backward, `preactivation` and `bend_rows` are written too.
    """
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    LAST: tl.constexpr = (DEPTH - 1) * MATRIX
    MOMENTUM: tl.constexpr = DEPTH * MATRIX
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * DEPTH * MATRIX
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    base += program % H * DEPTH * MATRIX
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    inside = d_columns < WIDTH
    for step in range(0, count):
        index = step * programs + program
        state = states + index * SIZE
        after = state + programs * SIZE
        hidden = index * BLOCK * HIDDEN
        series = program * DEPTH * num_tiles + first + step
        last = series + (DEPTH - 1) * num_tiles
        at, valid = token_rows(program, first + step, num_tokens, H, TILE, WIDTH, BLOCK)
        keys = tl.load(k + at + d_columns, mask=valid & inside, other=0.0)
        z = last_preactivation(
            k, at, valid, keys, state, base, x_rows + hidden, slope_rows + hidden, bend_rows + hidden,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, PRECISION, KEEP,
        )  # fmt: skip
        row, row_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
        row += index * BLOCK * WIDTH
        if KEEP:
            tl.store(preactivation + row, z, mask=row_mask)
        gamma, shift = load_norm(weight, bias, program % H, WIDTH, BLOCK_D, HAS_NORM)
        values = load(v + at, d_columns, valid & inside)
        u = descent(z, keys.to(tl.float32), values, gamma, shift, inside, eps, WIDTH, HAS_NORM).to(keys.dtype)
        tl.store(u_last + row, u, mask=row_mask)
        tl.debug_barrier()
        for j in range(0, HIDDEN, BLOCK_J):
            block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            if DEPTH == 1:
                x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            else:
                hidden_row, hidden_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
                hidden_row += hidden
                m = load_memory(state + LAST, base + LAST, block, mask, HAS_BASE).to(u.dtype)
                back = product(u, tl.trans(m), PRECISION)
                u_first = (back * load(slope_rows, hidden_row, hidden_mask)).to(u.dtype)
                if KEEP:
                    bend = back * load(bend_rows, hidden_row, hidden_mask)
                    tl.store(bend_rows + hidden_row, bend.to(u.dtype), mask=hidden_mask)
                tl.store(u_rows + hidden_row, u_first, mask=hidden_mask)
                first_at, first_mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
                fold_block(
                    keys, u_first, state, after, first_at, first_mask, rows + series * 4 * BLOCK, ends + series * 4,
                    MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
                )  # fmt: skip
                x = tl.load(x_rows + hidden_row, mask=hidden_mask, other=0.0)
            fold_block(
                x, u, state + LAST, after + LAST, block, mask, rows + last * 4 * BLOCK, ends + last * 4,
                MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
