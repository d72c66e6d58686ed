"""The walk over tiles: gradients at the tile's start, folded into the state behind it. Nothing is read here.

This is the serial chain, so it is kept short: one program per batch row and head, and everything that a query needs
(`triton_read.py`) is left in scratch, to be read by all tiles of a group at once. Tile i finds its state in
`states[i]` and writes `states[i + 1]`, float32.
"""

from functools import partial

import triton
import triton.language as tl

from .triton_entries import entries
from .triton_math import activation, descent
from .triton_tiles import (
    BEND,
    SLOPE,
    U_LAST,
    U,
    X,
    Z,
    column_block,
    first_block,
    hidden_rows,
    last_block,
    load,
    load_first,
    load_float,
    load_last,
    load_norm,
    load_tokens,
    product,
    row_coefficients,
    scratch_of,
    token_rows,
    width_rows,
)


@triton.jit
def last_preactivation(
    k, at, valid, keys, state, base, wide,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What the last matrix makes of the keys; at depth 2 their features, and the derivatives there, go to scratch."""
    dtype = keys.dtype
    z = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
        else:
            m = load_first(state, base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, HAS_BASE).to(dtype)
            x, slope, curvature = activation(product(keys, m, PRECISION), ACT)
            x = x.to(dtype)
            row, mask = hidden_rows(wide, X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            tl.store(row, x, mask=mask)
            row, _ = hidden_rows(wide, SLOPE, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            tl.store(row, slope.to(dtype), mask=mask)
            if KEEP:
                row, _ = hidden_rows(wide, BEND, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
                tl.store(row, curvature.to(dtype), mask=mask)
        m = load_last(state, base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, HAS_BASE).to(dtype)
        z += product(x, m, PRECISION)
    return z


@triton.jit
def first_directions(
    u_last, state, base, wide, j,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Directions of one hidden block of the first of two layers."""
    m = load_last(state, base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, HAS_BASE).to(u_last.dtype)
    back = product(u_last, tl.trans(m), PRECISION)
    row, mask = hidden_rows(wide, SLOPE, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    u = (back * load_float(row, mask)).to(u_last.dtype)
    row, _ = hidden_rows(wide, U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    tl.store(row, u, mask=mask)
    if KEEP:
        row, _ = hidden_rows(wide, BEND, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        tl.store(row, (back * load_float(row, mask)).to(u_last.dtype), mask=mask)
    return u


@triton.jit
def fold_block(
    x, u, block, mask, step, rows, ends,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`d' = β d + f s + Σ G_s x_sᵀ u_s`, `s' = m s + Σ N_s x_sᵀ u_s` of one block; the results lie `step` further."""
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    d = tl.load(ends) * load(block, mask)
    if HAS_MOMENTUM:
        s = load(block + MOMENTUM, mask)
        d += tl.load(ends + 1) * s
        s = tl.load(ends + 2) * s + product(tl.trans((write_momentum * x).to(u.dtype)), u, PRECISION)
        tl.store(block + step + MOMENTUM, s, mask=mask)
    tl.store(block + step, d + product(tl.trans((write * x).to(u.dtype)), u, PRECISION), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "count"])
def advance_kernel(
    k, v, rows, ends, base, weight, bias, states, wide, narrow, sums,
    num_tokens, num_tiles, first, count, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Tiles first, ..., first + count - 1 of every row and head, from `states[0]`; scratch of tile i lies at i."""
    MOMENTUM: tl.constexpr = DEPTH * WIDTH * HIDDEN
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * MOMENTUM
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    base += program % H * MOMENTUM
    for step in tl.range(0, count, disable_licm=True):
        index = step * programs + program
        state = states + index * SIZE
        planes, lines = scratch_of(index, wide, narrow, DEPTH, HIDDEN, WIDTH, BLOCK, KEEP)
        series = program * DEPTH * num_tiles + first + step
        last = series + (DEPTH - 1) * num_tiles
        at, valid = token_rows(program, first + step, num_tokens, H, TILE, WIDTH, BLOCK)
        keys = load_tokens(k, at, valid, WIDTH, BLOCK_D)
        z = last_preactivation(
            k, at, valid, keys, state, base, planes,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, PRECISION, KEEP,
        )  # fmt: skip
        if KEEP:
            line, line_mask = width_rows(sums + index * 4 * BLOCK * WIDTH, Z, WIDTH, BLOCK, BLOCK_D)
            tl.store(line, z, mask=line_mask)
        gamma, shift = load_norm(weight, bias, program % H, WIDTH, BLOCK_D, HAS_NORM)
        values = load_tokens(v, at, valid, WIDTH, BLOCK_D).to(tl.float32)
        inside = (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
        u = descent(z, keys.to(tl.float32), values, gamma, shift, inside, eps, WIDTH, HAS_NORM).to(keys.dtype)
        direction, line_mask = width_rows(lines, U_LAST, WIDTH, BLOCK, BLOCK_D)
        tl.store(direction, u, mask=line_mask)
        tl.debug_barrier()
        for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
            if DEPTH == 1:
                x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            else:
                u_first = first_directions(
                    u, state, base, planes, j,
                    DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, PRECISION, KEEP,
                )  # fmt: skip
                block, mask = first_block(state, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
                fold_block(
                    keys, u_first, block, mask, programs * SIZE, rows + series * 4 * BLOCK, ends + series * 4,
                    MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
                )  # fmt: skip
                row, row_mask = hidden_rows(planes, X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
                x = load(row, row_mask)
            block, mask = last_block(state, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            fold_block(
                x, u, block, mask, programs * SIZE, rows + last * 4 * BLOCK, ends + last * 4,
                MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()


compile_entries = partial(entries, {"advance": (advance_kernel, True)})
