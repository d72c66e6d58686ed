"""The walk over tiles backwards: gradients of the states, through the folds and through the inner gradient itself.

Like its counterpart, `triton_advance.py`, this chain holds only what the next tile waits for: one program per batch row
and head, from the last tile of a group to the first. Tile i finds the gradients of the state behind it in
`cot_states[i + 1]` and writes `cot_states[i]`. What is left for `triton_finish.py` lies in scratch.
"""

import triton
import triton.language as tl

from .triton_math import descent_vjp
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
def write_vjp(narrow, wide, g, write, PRECISION: tl.constexpr):
    """From `g [wide, narrow]`, the gradient of `Σ_s write_s wide_sᵀ narrow_s`, to those of narrow and write."""
    back = product(wide, g, PRECISION)
    return write * back, tl.sum(narrow.to(tl.float32) * back, axis=1)


@triton.jit
def fold_first_vjp(
    u, keys, cot_state, block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that the fold of one block of a first matrix hands to the directions and to both writes."""
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    g = load(cot_state, block, mask).to(keys.dtype)
    cot_u, cot_write = write_vjp(u, keys, g, write, PRECISION)
    cot_write_momentum = tl.zeros_like(cot_write)
    if HAS_MOMENTUM:
        g = load(cot_state + MOMENTUM, block, mask).to(keys.dtype)
        part, cot_write_momentum = write_vjp(u, keys, g, write_momentum, PRECISION)
        cot_u += part
    return cot_u, cot_write, cot_write_momentum


@triton.jit
def fold_last_vjp(
    x, u, cot_state, block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for a last matrix: for its inputs, its directions, and both writes."""
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    g = load(cot_state, block, mask).to(u.dtype)
    cot_x, cot_write = write_vjp(x, u, tl.trans(g), write, PRECISION)
    cot_u = product((write * x).to(u.dtype), g, PRECISION)
    cot_write_momentum = tl.zeros_like(cot_write)
    if HAS_MOMENTUM:
        g = load(cot_state + MOMENTUM, block, mask).to(u.dtype)
        part, cot_write_momentum = write_vjp(x, u, tl.trans(g), write_momentum, PRECISION)
        cot_x += part
        cot_u += product((write_momentum * x).to(u.dtype), g, PRECISION)
    return cot_x, cot_u, cot_write, cot_write_momentum


@triton.jit
def folds_vjp(
    k, at, valid, u_last, state, base, cot_state, rows, last_rows, x_rows, u_rows, slope_rows, bend_rows, cot_x, cot_u,
    cot_u_last, cot_rows, cot_last_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First sweep: back through the folds, and through the first layer's directions. Adds to `cot_u_last`.

    Depth 1 adds to `cot_x`. Depth 2 leaves there what the first pre-activation gets without the last one, and in
    `cot_u` the gradient of `u m_lastᵀ`.
    """
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    MOMENTUM: tl.constexpr = DEPTH * WIDTH * HIDDEN
    t, d_columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)[None, :]
    keys = tl.load(k + at + d_columns, mask=valid & (d_columns < WIDTH), other=0.0)
    width_row, width_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
    u = tl.load(u_last + width_row, mask=width_mask, other=0.0)
    dtype = u.dtype
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    write = tl.zeros([BLOCK], tl.float32)
    write_momentum = tl.zeros([BLOCK], tl.float32)
    write_last = tl.zeros([BLOCK], tl.float32)
    write_momentum_last = tl.zeros([BLOCK], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
        else:
            x = tl.load(x_rows + row, mask=row_mask, other=0.0)
        part_x, part, a, b = fold_last_vjp(
            x, u, cot_state + LAST, block, mask, last_rows, MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION
        )  # fmt: skip
        total += part
        write_last += a
        write_momentum_last += b
        part_x += load(cot_x, row, row_mask)
        if DEPTH > 1:
            first, first_mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            part_u, a, b = fold_first_vjp(
                tl.load(u_rows + row, mask=row_mask, other=0.0), keys, cot_state, first, first_mask, rows,
                MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            write += a
            write_momentum += b
            part_u += load(cot_u, row, row_mask)
            slope = load(slope_rows, row, row_mask)
            part_x = part_u * load(bend_rows, row, row_mask) + part_x * slope
            part_u = (part_u * slope).to(dtype)
            tl.store(cot_u + row, part_u, mask=row_mask)
            m = load_memory(state + LAST, base + LAST, block, mask, HAS_BASE).to(dtype)
            total += product(part_u, m, PRECISION)
        tl.store(cot_x + row, part_x.to(dtype), mask=row_mask)
    total += tl.load(cot_u_last + width_row, mask=width_mask, other=0.0)
    tl.store(cot_u_last + width_row, total, mask=width_mask)
    tl.store(cot_last_rows + 2 * BLOCK + t, write_last)
    tl.store(cot_last_rows + 3 * BLOCK + t, write_momentum_last)
    if DEPTH > 1:
        tl.store(cot_rows + 2 * BLOCK + t, write)
        tl.store(cot_rows + 3 * BLOCK + t, write_momentum)


@triton.jit
def state_vjp(
    y, cot_r, cot_memory, cot_state, cot_before, block, mask, rows, ends,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of offset and momentum, from behind the tile to in front of it."""
    beta, f = row_coefficients(rows, BLOCK)
    y = tl.trans(y)
    g = load(cot_state, block, mask)
    after = tl.load(ends) * g + cot_memory + product(y, (beta * cot_r).to(y.dtype), PRECISION)
    tl.store(cot_before + block, after, mask=mask)
    if HAS_MOMENTUM:
        after = tl.load(ends + 1) * g + tl.load(ends + 2) * load(cot_state + MOMENTUM, block, mask)
        after += product(y, (f * cot_r).to(y.dtype), PRECISION)
        tl.store(cot_before + MOMENTUM + block, after, mask=mask)


@triton.jit
def memory_vjp(
    q, k, at, valid, u_last, cot_z_rows, cot_r_rows, state, base, cot_state, cot_before, rows, ends, last_rows,
    last_ends, x_rows, y_rows, r_rows, slope_rows, cot_x, cot_u,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second sweep: the memory at which the directions were taken, and with it the state in front of the tile.

    `cot_x` ends as the gradient of the first pre-activation, or at depth 1 as that of the keys but for the loss.
    """
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    MOMENTUM: tl.constexpr = DEPTH * WIDTH * HIDDEN
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    inside = valid & (d_columns < WIDTH)
    width_row, width_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
    cot_z = tl.load(cot_z_rows + width_row, mask=width_mask, other=0.0)
    dtype = cot_z.dtype
    for j in range(0, HIDDEN, BLOCK_J):
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        m = load_memory(state + LAST, base + LAST, block, mask, HAS_BASE).to(dtype)
        part = product(cot_z, tl.trans(m), PRECISION)
        if DEPTH == 1:
            tl.store(cot_x + row, (part + load(cot_x, row, row_mask)).to(dtype), mask=row_mask)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
            cot_memory = product(tl.trans(column_block(k, at, valid, j, HIDDEN, BLOCK_J)), cot_z, PRECISION)
        else:
            part = (load(cot_x, row, row_mask) + part * load(slope_rows, row, row_mask)).to(dtype)
            tl.store(cot_x + row, part, mask=row_mask)
            keys = tl.load(k + at + d_columns, mask=inside, other=0.0)
            queries = tl.load(q + at + d_columns, mask=inside, other=0.0)
            first, first_mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            state_vjp(
                queries, tl.load(r_rows + row, mask=row_mask, other=0.0), product(tl.trans(keys), part, PRECISION),
                cot_state, cot_before, first, first_mask, rows, ends, MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            x = tl.load(x_rows + row, mask=row_mask, other=0.0)
            u = tl.load(u_last + width_row, mask=width_mask, other=0.0)
            cot_memory = product(tl.trans(x), cot_z, PRECISION)
            cot_memory += product(tl.trans(tl.load(cot_u + row, mask=row_mask, other=0.0)), u, PRECISION)
            y = tl.load(y_rows + row, mask=row_mask, other=0.0)
        cot_r = tl.load(cot_r_rows + width_row, mask=width_mask, other=0.0)
        state_vjp(
            y, cot_r, cot_memory, cot_state + LAST, cot_before + LAST, block, mask, last_rows, last_ends,
            MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip


@triton.jit
def loss_vjp(
    k, v, weight, bias, at, inside, head, preactivation, cot_u_last, cot_z, cot_v, cot_norm, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Between the sweeps: back through the descent direction. Gradients of the norm go on top of the read's."""
    d = tl.arange(0, BLOCK_D)
    row, row_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
    gamma, shift = load_norm(weight, bias, head, WIDTH, BLOCK_D, HAS_NORM)
    back, cot_values, cot_gamma, cot_shift = descent_vjp(
        tl.load(preactivation + row, mask=row_mask, other=0.0), load(k + at, d[None, :], inside),
        load(v + at, d[None, :], inside), tl.load(cot_u_last + row, mask=row_mask, other=0.0),
        gamma, shift, (d < WIDTH)[None, :], eps, WIDTH, HAS_NORM,
    )  # fmt: skip
    tl.store(cot_z + row, back.to(cot_z.dtype.element_ty), mask=row_mask)
    tl.store(cot_v + at + d[None, :], cot_values.to(cot_v.dtype.element_ty), mask=inside)
    if HAS_NORM:
        cot_gamma += tl.load(cot_norm + d, mask=d < WIDTH, other=0.0)
        cot_shift += tl.load(cot_norm + WIDTH + d, mask=d < WIDTH, other=0.0)
        tl.store(cot_norm + d, cot_gamma, mask=d < WIDTH)
        tl.store(cot_norm + WIDTH + d, cot_shift, mask=d < WIDTH)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "count"])
def reverse_kernel(
    q, k, v, rows, ends, base, weight, bias, states, preactivation, u_last, x_rows, u_rows, slope_rows, bend_rows,
    y_rows, r_rows, cot_x, cot_u, cot_r, cot_u_last, cot_states, cot_z, cot_v, cot_rows, cot_norm,
    num_tokens, num_tiles, first, count, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles first + count - 1, ..., first of every row and head, from `cot_states[count]`."""
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * DEPTH * WIDTH * HIDDEN
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    base += program % H * DEPTH * WIDTH * HIDDEN
    for step in range(0, count):
        tile = first + count - 1 - step
        index = (count - 1 - step) * programs + program
        state = states + index * SIZE
        cot_before = cot_states + index * SIZE
        cot_state = cot_before + programs * SIZE
        series = program * DEPTH * num_tiles + tile
        last = series + (DEPTH - 1) * num_tiles
        hidden = index * BLOCK * HIDDEN
        width = index * BLOCK * WIDTH
        at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
        folds_vjp(
            k, at, valid, u_last + width, state, base, cot_state, rows + series * 4 * BLOCK, rows + last * 4 * BLOCK,
            x_rows + hidden, u_rows + hidden, slope_rows + hidden, bend_rows + hidden, cot_x + hidden, cot_u + hidden,
            cot_u_last + width, cot_rows + series * 4 * BLOCK, cot_rows + last * 4 * BLOCK,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        # Through memory, so that what follows is free to spread over the warps in its own way.
        tl.debug_barrier()
        loss_vjp(
            k, v, weight, bias, at, valid & (tl.arange(0, BLOCK_D)[None, :] < WIDTH), program % H,
            preactivation + width, cot_u_last + width, cot_z + width, cot_v,
            cot_norm + (program * num_tiles + tile) * 2 * WIDTH, eps, WIDTH, BLOCK, BLOCK_D, HAS_NORM,
        )  # fmt: skip
        tl.debug_barrier()
        memory_vjp(
            q, k, at, valid, u_last + width, cot_z + width, cot_r + width, state, base, cot_state, cot_before,
            rows + series * 4 * BLOCK, ends + series * 4, rows + last * 4 * BLOCK, ends + last * 4,
            x_rows + hidden, y_rows + hidden, r_rows + hidden, slope_rows + hidden, cot_x + hidden, cot_u + hidden,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
