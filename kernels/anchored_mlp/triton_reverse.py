"""The walk over tiles backwards: gradients of the states, through the folds and through the inner gradient itself.

Like its counterpart, `triton_advance.py`, this chain holds only what the next tile waits for: one program per batch
row and head, from the last tile of a group to the first. Tile i finds the gradients of the state behind it in
`cot_states[i + 1]` and writes `cot_states[i]`. What is left for `triton_finish.py` lies in scratch.
"""

from functools import partial

import triton
import triton.language as tl

from .triton_entries import entries
from .triton_math import descent_vjp
from .triton_tiles import (
    BEND,
    COT_R,
    COT_U,
    COT_U_LAST,
    COT_X,
    COT_Z,
    SLOPE,
    U_LAST,
    R,
    U,
    X,
    Y,
    Z,
    column_block,
    first_block,
    hidden_rows,
    last_block,
    load,
    load_float,
    load_last,
    load_norm,
    load_tokens,
    product,
    row_coefficients,
    scratch_of,
    store_tokens,
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
    u, keys, block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that the fold of one block of a first matrix hands to the directions and to both writes."""
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    cot_u, cot_write = write_vjp(u, keys, load(block, mask).to(keys.dtype), write, PRECISION)
    cot_write_momentum = tl.zeros_like(cot_write)
    if HAS_MOMENTUM:
        g = load(block + MOMENTUM, mask).to(keys.dtype)
        part, cot_write_momentum = write_vjp(u, keys, g, write_momentum, PRECISION)
        cot_u += part
    return cot_u, cot_write, cot_write_momentum


@triton.jit
def fold_last_vjp(
    x, u, block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for a last matrix: for its inputs, its directions, and both writes."""
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    g = load(block, mask).to(u.dtype)
    cot_x, cot_write = write_vjp(x, u, tl.trans(g), write, PRECISION)
    cot_u = product((write * x).to(u.dtype), g, PRECISION)
    cot_write_momentum = tl.zeros_like(cot_write)
    if HAS_MOMENTUM:
        g = load(block + MOMENTUM, mask).to(u.dtype)
        part, cot_write_momentum = write_vjp(x, u, tl.trans(g), write_momentum, PRECISION)
        cot_x += part
        cot_u += product((write_momentum * x).to(u.dtype), g, PRECISION)
    return cot_x, cot_u, cot_write, cot_write_momentum


@triton.jit
def first_directions_vjp(
    keys, part_x, m_last, cot_state, rows, wide, j,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One hidden block of the first of two layers: the gradient of `u m_lastᵀ` (COT_U), and what the first
    pre-activation gets without the last one; returns that, and the parts of u and of both writes."""
    block, mask = first_block(cot_state, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    row, row_mask = hidden_rows(wide, U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    part_u, write, write_momentum = fold_first_vjp(
        load(row, row_mask), keys, block, mask, rows, DEPTH * WIDTH * HIDDEN, BLOCK, HAS_MOMENTUM, PRECISION
    )  # fmt: skip
    cot_row, _ = hidden_rows(wide, COT_U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    part_u += load_float(cot_row, row_mask)
    row, _ = hidden_rows(wide, SLOPE, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    slope = load_float(row, row_mask)
    row, _ = hidden_rows(wide, BEND, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    part_x = part_u * load_float(row, row_mask) + part_x * slope
    part_u = (part_u * slope).to(keys.dtype)
    tl.store(cot_row, part_u, mask=row_mask)
    return part_x, product(part_u, m_last, PRECISION), write, write_momentum


@triton.jit
def folds_vjp(
    k, at, valid, state, base, cot_state, rows, last_rows, wide, lines, sums, cot_rows, cot_last_rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First sweep: back through the folds, and through the first layer's directions, to X, U and U_LAST."""
    t = tl.arange(0, BLOCK)
    keys = load_tokens(k, at, valid, WIDTH, BLOCK_D)
    line, line_mask = width_rows(lines, U_LAST, WIDTH, BLOCK, BLOCK_D)
    u = load(line, line_mask)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    write = tl.zeros([BLOCK], tl.float32)
    write_momentum = tl.zeros([BLOCK], tl.float32)
    write_last = tl.zeros([BLOCK], tl.float32)
    write_momentum_last = tl.zeros([BLOCK], tl.float32)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        row, row_mask = hidden_rows(wide, X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        x = column_block(k, at, valid, j, HIDDEN, BLOCK_J) if DEPTH == 1 else load(row, row_mask)
        block, mask = last_block(cot_state, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        part_x, part, a, b = fold_last_vjp(
            x, u, block, mask, last_rows, DEPTH * WIDTH * HIDDEN, BLOCK, HAS_MOMENTUM, PRECISION
        )  # fmt: skip
        total += part
        write_last += a
        write_momentum_last += b
        row, _ = hidden_rows(wide, COT_X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        part_x += load_float(row, row_mask)
        if DEPTH > 1:
            m = load_last(state, base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, HAS_BASE).to(u.dtype)
            part_x, part, a, b = first_directions_vjp(
                keys, part_x, m, cot_state, rows, wide, j,
                DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            total += part
            write += a
            write_momentum += b
        tl.store(row, part_x.to(u.dtype), mask=row_mask)
    total_at, line_mask = width_rows(sums, COT_U_LAST, WIDTH, BLOCK, BLOCK_D)
    tl.store(total_at, total + load(total_at, line_mask), mask=line_mask)
    tl.store(cot_last_rows + 2 * BLOCK + t, write_last)
    tl.store(cot_last_rows + 3 * BLOCK + t, write_momentum_last)
    if DEPTH > 1:
        tl.store(cot_rows + 2 * BLOCK + t, write)
        tl.store(cot_rows + 3 * BLOCK + t, write_momentum)


@triton.jit
def loss_vjp(
    k, v, weight, bias, at, valid, head, lines, sums, cot_v, cot_norm, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Between the sweeps: back through the descent direction. Gradients of the norm go on top of the read's."""
    d = tl.arange(0, BLOCK_D)
    gamma, shift = load_norm(weight, bias, head, WIDTH, BLOCK_D, HAS_NORM)
    row, mask = width_rows(sums, Z, WIDTH, BLOCK, BLOCK_D)
    cot_row, _ = width_rows(sums, COT_U_LAST, WIDTH, BLOCK, BLOCK_D)
    keys = load_tokens(k, at, valid, WIDTH, BLOCK_D).to(tl.float32)
    values = load_tokens(v, at, valid, WIDTH, BLOCK_D).to(tl.float32)
    back, cot_values, cot_gamma, cot_shift = descent_vjp(
        load(row, mask), keys, values, load(cot_row, mask), gamma, shift, (d < WIDTH)[None, :], eps, WIDTH, HAS_NORM
    )  # fmt: skip
    row, mask = width_rows(lines, COT_Z, WIDTH, BLOCK, BLOCK_D)
    tl.store(row, back.to(lines.dtype.element_ty), mask=mask)
    store_tokens(cot_v, at, valid, cot_values, WIDTH, BLOCK_D)
    if HAS_NORM:
        cot_gamma += tl.load(cot_norm + d, mask=d < WIDTH, other=0.0)
        cot_shift += tl.load(cot_norm + WIDTH + d, mask=d < WIDTH, other=0.0)
        tl.store(cot_norm + d, cot_gamma, mask=d < WIDTH)
        tl.store(cot_norm + WIDTH + d, cot_shift, mask=d < WIDTH)


@triton.jit
def state_vjp(
    y, cot_r, cot_memory, block, mask, step, rows, ends,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of offset and momentum in front of the tile; those behind it lie `step` further."""
    beta, f = row_coefficients(rows, BLOCK)
    y = tl.trans(y)
    g = load(block + step, mask)
    before = tl.load(ends) * g + cot_memory + product(y, (beta * cot_r).to(y.dtype), PRECISION)
    tl.store(block, before, mask=mask)
    if HAS_MOMENTUM:
        before = tl.load(ends + 1) * g + tl.load(ends + 2) * load(block + step + MOMENTUM, mask)
        before += product(y, (f * cot_r).to(y.dtype), PRECISION)
        tl.store(block + MOMENTUM, before, mask=mask)


@triton.jit
def first_memory_vjp(
    q, k, at, valid, back, cot_state, step, rows, ends, wide, j,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One hidden block of the first of two layers, from what comes back through the last pre-activation."""
    cot_row, mask = hidden_rows(wide, COT_X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    row, _ = hidden_rows(wide, SLOPE, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    keys = load_tokens(k, at, valid, WIDTH, BLOCK_D)
    cot_z = (load_float(cot_row, mask) + back * load_float(row, mask)).to(keys.dtype)
    tl.store(cot_row, cot_z, mask=mask)
    cot_memory = product(tl.trans(keys), cot_z, PRECISION)
    row, _ = hidden_rows(wide, R, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    cot_r = load(row, mask)
    block, mask = first_block(cot_state, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    state_vjp(
        load_tokens(q, at, valid, WIDTH, BLOCK_D), cot_r, cot_memory, block, mask, step, rows, ends,
        DEPTH * WIDTH * HIDDEN, BLOCK, HAS_MOMENTUM, PRECISION,
    )  # fmt: skip


@triton.jit
def memory_vjp(
    q, k, at, valid, state, base, cot_state, step, rows, ends, last_rows, last_ends, wide, lines,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second sweep: the memory at which the directions were taken, and with it the state in front of the tile."""
    line, line_mask = width_rows(lines, COT_Z, WIDTH, BLOCK, BLOCK_D)
    cot_z = load(line, line_mask)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        m = load_last(state, base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, HAS_BASE).to(cot_z.dtype)
        back = product(cot_z, tl.trans(m), PRECISION)
        if DEPTH == 1:
            row, mask = hidden_rows(wide, COT_X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            tl.store(row, (back + load_float(row, mask)).to(cot_z.dtype), mask=mask)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
            cot_memory = product(tl.trans(column_block(k, at, valid, j, HIDDEN, BLOCK_J)), cot_z, PRECISION)
        else:
            first_memory_vjp(
                q, k, at, valid, back, cot_state, step, rows, ends, wide, j,
                DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
            row, mask = hidden_rows(wide, X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            cot_memory = product(tl.trans(load(row, mask)), cot_z, PRECISION)
            row, mask = hidden_rows(wide, COT_U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            direction, _ = width_rows(lines, U_LAST, WIDTH, BLOCK, BLOCK_D)
            cot_memory += product(tl.trans(load(row, mask)), load(direction, line_mask), PRECISION)
            row, mask = hidden_rows(wide, Y, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            y = load(row, mask)
        read_line, _ = width_rows(lines, COT_R, WIDTH, BLOCK, BLOCK_D)
        cot_r = load(read_line, line_mask)
        block, mask = last_block(cot_state, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        state_vjp(
            y, cot_r, cot_memory, block, mask, step, last_rows, last_ends,
            DEPTH * WIDTH * HIDDEN, BLOCK, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "count"])
def reverse_kernel(
    q, k, v, rows, ends, base, weight, bias, states, cot_states, wide, narrow, sums, cot_v, cot_rows, cot_norm,
    num_tokens, num_tiles, first, count, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles first + count - 1, ..., first of every row and head, from `cot_states[count]`."""
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * DEPTH * WIDTH * HIDDEN
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    base += program % H * DEPTH * WIDTH * HIDDEN
    for back in tl.range(0, count, disable_licm=True):
        tile = first + count - 1 - back
        index = (count - 1 - back) * programs + program
        state = states + index * SIZE
        cot_state = cot_states + index * SIZE
        planes, lines = scratch_of(index, wide, narrow, DEPTH, HIDDEN, WIDTH, BLOCK, True)
        line_sums = sums + index * 4 * BLOCK * WIDTH
        series = program * DEPTH * num_tiles + tile
        last = series + (DEPTH - 1) * num_tiles
        at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
        folds_vjp(
            k, at, valid, state, base, cot_state + programs * SIZE, rows + series * 4 * BLOCK,
            rows + last * 4 * BLOCK, planes, lines, line_sums, cot_rows + series * 4 * BLOCK,
            cot_rows + last * 4 * BLOCK,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        # Through memory, so that what follows is free to spread over the warps in its own way.
        tl.debug_barrier()
        loss_vjp(
            k, v, weight, bias, at, valid, program % H, lines, line_sums, cot_v,
            cot_norm + (program * num_tiles + tile) * 2 * WIDTH, eps, WIDTH, BLOCK, BLOCK_D, HAS_NORM,
        )  # fmt: skip
        tl.debug_barrier()
        memory_vjp(
            q, k, at, valid, state, base, cot_state, programs * SIZE, rows + series * 4 * BLOCK, ends + series * 4,
            rows + last * 4 * BLOCK, ends + last * 4, planes, lines,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()


compile_entries = partial(entries, {"reverse": (reverse_kernel, True)})
