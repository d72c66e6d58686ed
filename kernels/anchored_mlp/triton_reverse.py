"""The walk over tiles, backwards: gradients of the states, through the folds and through the inner gradient itself.

One program per batch row and head, over the tiles of a group from the last to the first. `triton_read.py` has been
over them before; gradients of the states stay in float32 in global memory, like the masters of the forward walk.
"""

import triton
import triton.language as tl

from .triton_math import activation, descent, descent_vjp
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
def outer_vjp(narrow, wide, g, write, PRECISION: tl.constexpr):
    """Gradients of `Σ_s write_s wide_sᵀ narrow_s` for narrow, wide and write, from `g [wide, narrow]`."""
    g = g.to(wide.dtype)
    back = product(wide, g, PRECISION)
    narrow = narrow.to(tl.float32)
    cot_wide = product((write * narrow).to(wide.dtype), tl.trans(g), PRECISION)
    return write * back, cot_wide, tl.sum(narrow * back, axis=1)


@triton.jit
def fold_vjp(
    narrow, wide, state, cot_state, block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that one block of a fold hands to its rows: narrow, wide, and both writes; then keep, pull, carry.

    The block of a first matrix is `[wide, narrow]`, that of a last one its transpose.
    """
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    g = load(cot_state, block, mask)
    keep = tl.sum(g * load(state, block, mask))
    pull, carry = 0.0, 0.0
    if HAS_MOMENTUM:
        pull = tl.sum(g * load(state + MOMENTUM, block, mask))
    cot_narrow, cot_wide, cot_write = outer_vjp(narrow, wide, g if FIRST else tl.trans(g), write, PRECISION)
    cot_write_momentum = tl.zeros_like(cot_write)
    if HAS_MOMENTUM:
        g = load(cot_state + MOMENTUM, block, mask)
        carry = tl.sum(g * load(state + MOMENTUM, block, mask))
        part, part_wide, cot_write_momentum = outer_vjp(
            narrow, wide, g if FIRST else tl.trans(g), write_momentum, PRECISION
        )  # fmt: skip
        cot_narrow += part
        cot_wide += part_wide
    return cot_narrow, cot_wide, cot_write, cot_write_momentum, keep, pull, carry


@triton.jit
def state_vjp(
    y, cot_r, cot_memory, cot_state, cot_base, block, mask, rows, ends,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of offset, momentum and base, moved from behind the tile to in front of it."""
    beta, f = row_coefficients(rows, BLOCK)
    rows_of_y = tl.trans(y)
    g = load(cot_state, block, mask)
    if HAS_MOMENTUM:
        momentum = tl.load(ends + 1) * g + tl.load(ends + 2) * load(cot_state + MOMENTUM, block, mask)
        momentum += product(rows_of_y, (f * cot_r).to(y.dtype), PRECISION)
        tl.store(cot_state + MOMENTUM + block, momentum, mask=mask)
    after = tl.load(ends) * g + cot_memory + product(rows_of_y, (beta * cot_r).to(y.dtype), PRECISION)
    tl.store(cot_state + block, after, mask=mask)
    if HAS_BASE:
        total = load(cot_base, block, mask) + cot_memory + product(rows_of_y, cot_r, PRECISION)
        tl.store(cot_base + block, total, mask=mask)


@triton.jit
def store_fold(cot_rows, cot_ends, cot_write, cot_write_momentum, keep, pull, carry, BLOCK: tl.constexpr):
    t = tl.arange(0, BLOCK)
    tl.store(cot_rows + 2 * BLOCK + t, cot_write)
    tl.store(cot_rows + 3 * BLOCK + t, cot_write_momentum)
    tl.store(cot_ends, keep)
    tl.store(cot_ends + 1, pull)
    tl.store(cot_ends + 2, carry)
    tl.store(cot_ends + 3, 0.0)


@triton.jit
def folds_vjp(
    k, at, valid, keys, u, x_rows, u_rows, state, base, cot_state, rows, last_rows, cot_x, cot_u, cot_rows, cot_last_rows,
    cot_ends, cot_last_ends,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """First sweep: back through the folds and the first layer's directions. Returns parts for keys and for u.

    Depth 1 adds to `cot_x`. Depth 2 leaves there what the first pre-activation gets without the last one, and in
    `cot_u` the gradient of `u m_lastᵀ`.
    """
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    LAST: tl.constexpr = (DEPTH - 1) * MATRIX
    MOMENTUM: tl.constexpr = DEPTH * MATRIX
    dtype = keys.dtype
    total_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    total_u = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    write = tl.zeros([BLOCK], tl.float32)
    write_momentum = tl.zeros([BLOCK], tl.float32)
    write_last = tl.zeros([BLOCK], tl.float32)
    write_momentum_last = tl.zeros([BLOCK], tl.float32)
    keep, pull, carry, keep_last, pull_last, carry_last = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(0, HIDDEN, BLOCK_J):
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
        else:
            x = tl.load(x_rows + row, mask=row_mask, other=0.0)
        cot_narrow, cot_wide, a, b, part_keep, part_pull, part_carry = fold_vjp(
            x, u, state + LAST, cot_state + LAST, block, mask, last_rows,
            MOMENTUM, BLOCK, False, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        part_x = load(cot_x, row, row_mask) + cot_narrow
        total_u += cot_wide
        write_last += a
        write_momentum_last += b
        keep_last += part_keep
        pull_last += part_pull
        carry_last += part_carry
        if DEPTH > 1:
            first, first_mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            cot_narrow, cot_wide, a, b, part_keep, part_pull, part_carry = fold_vjp(
                tl.load(u_rows + row, mask=row_mask, other=0.0), keys, state, cot_state, first, first_mask, rows,
                MOMENTUM, BLOCK, True, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            part_u = load(cot_u, row, row_mask) + cot_narrow
            total_k += cot_wide
            m = load_memory(state, base, first, first_mask, HAS_BASE).to(dtype)
            _, slope, curvature = activation(product(keys, m, PRECISION), ACT)
            m = load_memory(state + LAST, base + LAST, block, mask, HAS_BASE).to(dtype)
            back = product(u, tl.trans(m), PRECISION)
            total_u += product((part_u * slope).to(dtype), m, PRECISION)
            tl.store(cot_u + row, part_u * slope, mask=row_mask)
            part_x = part_u * back * curvature + part_x * slope
            write += a
            write_momentum += b
            keep += part_keep
            pull += part_pull
            carry += part_carry
        tl.store(cot_x + row, part_x, mask=row_mask)
    store_fold(cot_last_rows, cot_last_ends, write_last, write_momentum_last, keep_last, pull_last, carry_last, BLOCK)
    if DEPTH > 1:
        store_fold(cot_rows, cot_ends, write, write_momentum, keep, pull, carry, BLOCK)
    return total_k, total_u


@triton.jit
def memory_vjp(
    q, k, at, valid, keys, queries, u, cot_z, cot_r, state, base, cot_state, cot_base, rows, ends, last_rows, last_ends,
    y_rows, r_rows, cot_x, cot_u,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Second sweep: gradients of the memory at which the directions were taken, joined to those of the states.

    Returns the keys' part at depth 2; at depth 1 it is left in `cot_x`.
    """
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    LAST: tl.constexpr = (DEPTH - 1) * MATRIX
    MOMENTUM: tl.constexpr = DEPTH * MATRIX
    dtype = keys.dtype
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        m = load_memory(state + LAST, base + LAST, block, mask, HAS_BASE).to(dtype)
        back = product(cot_z, tl.trans(m), PRECISION)
        part = load(cot_x, row, row_mask)
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
            tl.store(cot_x + row, part + back, mask=row_mask)
            cot_memory = product(tl.trans(x), cot_z, PRECISION)
        else:
            first, first_mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            m = load_memory(state, base, first, first_mask, HAS_BASE).to(dtype)
            x, slope, _ = activation(product(keys, m, PRECISION), ACT)
            cot_z1 = (part + back * slope).to(dtype)
            total += product(cot_z1, tl.trans(m), PRECISION)
            state_vjp(
                queries, tl.load(r_rows + row, mask=row_mask, other=0.0), product(tl.trans(keys), cot_z1, PRECISION),
                cot_state, cot_base, first, first_mask, rows, ends, MOMENTUM, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            y = tl.load(y_rows + row, mask=row_mask, other=0.0)
            cot_memory = product(tl.trans(x.to(dtype)), cot_z, PRECISION)
            cot_memory += product(tl.trans(load(cot_u, row, row_mask).to(dtype)), u, PRECISION)
        state_vjp(
            y, cot_r, cot_memory, cot_state + LAST, cot_base + LAST, block, mask, last_rows, last_ends,
            MOMENTUM, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
    return total


@triton.jit
def add_norm_gradients(cot_norm, cot_weight, cot_bias, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """On top of what the read has left there."""
    d = tl.arange(0, BLOCK_D)
    tl.store(cot_norm + d, tl.load(cot_norm + d, mask=d < WIDTH, other=0.0) + cot_weight, mask=d < WIDTH)
    bias = cot_norm + WIDTH + d
    tl.store(bias, tl.load(bias, mask=d < WIDTH, other=0.0) + cot_bias, mask=d < WIDTH)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "count"])
def reverse_kernel(
    q, k, v, rows, ends, base, weight, bias, states, preactivation, x_rows, u_rows, y_rows, r_rows, cot_x, cot_u, cot_r, cot_u_last,
    cot_k_rows, cot_state, cot_base, cot_k, cot_v, cot_rows, cot_ends, cot_norm,
    num_tokens, num_tiles, first, count, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles first + count - 1, ..., first; `cot_state [B, H, size]` and `cot_base` are advanced in place."""
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * DEPTH * MATRIX
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    inside = d_columns < WIDTH
    gamma, shift = load_norm(weight, bias, program % H, WIDTH, BLOCK_D, HAS_NORM)
    base += program % H * DEPTH * MATRIX
    cot_state += program * SIZE
    cot_base += program * DEPTH * MATRIX
    dtype = k.dtype.element_ty
    for step in range(0, count):
        tile = first + count - 1 - step
        index = (count - 1 - step) * programs + program
        series = program * DEPTH * num_tiles + tile
        last = series + (DEPTH - 1) * num_tiles
        hidden = index * BLOCK * HIDDEN
        row, row_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
        row += index * BLOCK * WIDTH
        at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
        keys = tl.load(k + at + d_columns, mask=valid & inside, other=0.0)
        values = load(v + at, d_columns, valid & inside)
        z = tl.load(preactivation + row, mask=row_mask, other=0.0)
        u = descent(z, keys.to(tl.float32), values, gamma, shift, inside, eps, WIDTH, HAS_NORM).to(dtype)
        total_k, total_u = folds_vjp(
            k, at, valid, keys, u, x_rows + hidden, u_rows + hidden, states + index * SIZE, base, cot_state, rows + series * 4 * BLOCK,
            rows + last * 4 * BLOCK, cot_x + hidden, cot_u + hidden, cot_rows + series * 4 * BLOCK,
            cot_rows + last * 4 * BLOCK, cot_ends + series * 4, cot_ends + last * 4,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        total_u += tl.load(cot_u_last + row, mask=row_mask, other=0.0)
        cot_z, cot_values, cot_gamma, cot_shift = descent_vjp(
            z, keys.to(tl.float32), values, total_u, gamma, shift, inside, eps, WIDTH, HAS_NORM
        )  # fmt: skip
        tl.store(cot_v + at + d_columns, cot_values.to(cot_v.dtype.element_ty), mask=valid & inside)
        if HAS_NORM:
            total_k -= cot_values
            add_norm_gradients(
                cot_norm + (program * num_tiles + tile) * 2 * WIDTH, cot_gamma, cot_shift, WIDTH, BLOCK_D
            )  # fmt: skip
        tl.debug_barrier()
        queries = tl.load(q + at + d_columns, mask=valid & inside, other=0.0)
        total_k += memory_vjp(
            q, k, at, valid, keys, queries, u, cot_z.to(dtype), tl.load(cot_r + row, mask=row_mask, other=0.0),
            states + index * SIZE, base, cot_state, cot_base, rows + series * 4 * BLOCK, ends + series * 4,
            rows + last * 4 * BLOCK, ends + last * 4, y_rows + hidden, r_rows + hidden, cot_x + hidden, cot_u + hidden,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        if DEPTH == 1:
            block, mask = hidden_rows(0, HIDDEN, BLOCK, BLOCK_D)
            total_k += load(cot_x + hidden, block, mask)
        else:
            total_k += tl.load(cot_k_rows + row, mask=row_mask, other=0.0)
        tl.store(cot_k + at + d_columns, total_k.to(cot_k.dtype.element_ty), mask=valid & inside)
