"""What is left of a group's backward once the reverse walk has gone over it; nothing here waits for another tile.

`keys_kernel`, one program per batch row, head and tile: gradients of the keys, and of β, f and m of the last token.
`base_kernel`, one program per batch row, head and block of the hidden width: the gradient of the base, a sum over tiles.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    column_block,
    first_block,
    hidden_rows,
    last_block,
    load,
    load_memory,
    product,
    row_coefficients,
    token_rows,
    width_rows,
)


@triton.jit
def end_products(
    state, cot_state, block, mask, MOMENTUM: tl.constexpr, HAS_MOMENTUM: tl.constexpr
):  # fmt: skip
    """One block's parts of the gradients of keep, pull and carry, summed over its columns."""
    g = load(cot_state, block, mask)
    keep = tl.sum(g * load(state, block, mask), axis=1)
    pull = tl.zeros_like(keep)
    carry = pull
    if HAS_MOMENTUM:
        s = load(state + MOMENTUM, block, mask)
        pull = tl.sum(g * s, axis=1)
        carry = tl.sum(load(cot_state + MOMENTUM, block, mask) * s, axis=1)
    return keep, pull, carry


@triton.jit
def store_ends(cot_ends, keep, pull, carry):
    tl.store(cot_ends, tl.sum(keep))
    tl.store(cot_ends + 1, tl.sum(pull))
    tl.store(cot_ends + 2, tl.sum(carry))
    tl.store(cot_ends + 3, 0.0)


@triton.jit
def first_keys(
    state, base, cot_state, u_rows, cot_x, rows, j,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one hidden block of the first of two layers hands to the keys: by its pre-activation and by its fold."""
    row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
    block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    cot = tl.load(cot_x + row, mask=row_mask, other=0.0)
    total = product(cot, tl.trans(load_memory(state, base, block, mask, HAS_BASE).to(cot.dtype)), PRECISION)
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    u = tl.load(u_rows + row, mask=row_mask, other=0.0)
    g = load(cot_state, block, mask).to(cot.dtype)
    total += product((write * u).to(cot.dtype), tl.trans(g), PRECISION)
    if HAS_MOMENTUM:
        g = load(cot_state + 2 * WIDTH * HIDDEN, block, mask).to(cot.dtype)
        total += product((write_momentum * u).to(cot.dtype), tl.trans(g), PRECISION)
    return total


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "programs"])
def keys_kernel(
    rows, base, states, cot_states, u_rows, cot_x, cot_k_read, cot_v, cot_k, cot_ends,
    num_tokens, num_tiles, first, programs, H,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    MOMENTUM: tl.constexpr = DEPTH * WIDTH * HIDDEN
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * MOMENTUM
    index = tl.program_id(0).to(tl.int64)
    program, tile = index % programs, first + index // programs
    base += program % H * MOMENTUM
    states += index * SIZE
    cot_states += (index + programs) * SIZE
    hidden = index * BLOCK * HIDDEN
    series = program * DEPTH * num_tiles + tile
    last = series + (DEPTH - 1) * num_tiles
    row, row_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
    if DEPTH == 1:
        total = load(cot_x + hidden, row, row_mask)
    else:
        total = tl.load(cot_k_read + index * BLOCK * WIDTH + row, mask=row_mask, other=0.0)
    keep = tl.zeros([BLOCK_D], tl.float32)
    pull = tl.zeros([BLOCK_D], tl.float32)
    carry = tl.zeros([BLOCK_D], tl.float32)
    keep_last = tl.zeros([BLOCK_J], tl.float32)
    pull_last = tl.zeros([BLOCK_J], tl.float32)
    carry_last = tl.zeros([BLOCK_J], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        a, b, c = end_products(states + LAST, cot_states + LAST, block, mask, MOMENTUM, HAS_MOMENTUM)
        keep_last += a
        pull_last += b
        carry_last += c
        if DEPTH > 1:
            block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            a, b, c = end_products(states, cot_states, block, mask, MOMENTUM, HAS_MOMENTUM)
            keep += a
            pull += b
            carry += c
            total += first_keys(
                states, base, cot_states, u_rows + hidden, cot_x + hidden, rows + series * 4 * BLOCK, j,
                WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
    store_ends(cot_ends + last * 4, keep_last, pull_last, carry_last)
    if DEPTH > 1:
        store_ends(cot_ends + series * 4, keep, pull, carry)
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
    inside = valid & (d_columns < WIDTH)
    if HAS_NORM:
        total -= load(cot_v + at, d_columns, inside)
    tl.store(cot_k + at + d_columns, total.to(cot_k.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "first", "count", "programs"])
def base_kernel(
    q, k, x_rows, y_rows, r_rows, cot_x, cot_u, u_last, cot_r, cot_z, cot_base,
    num_tokens, first, count, programs, H,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the tiles of a group to `cot_base [B, H, size]`."""
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    index = tl.program_id(0).to(tl.int64)
    program, j = index % programs, (index // programs).to(tl.int32) * BLOCK_J
    cot_base += program * DEPTH * WIDTH * HIDDEN
    block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    first_at, first_mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    total_last = load(cot_base + LAST, block, mask)
    total = total_last
    if DEPTH > 1:
        total = load(cot_base, first_at, first_mask)
    for step in range(0, count):
        scratch = step * programs + program
        at, valid = token_rows(program, first + step, num_tokens, H, TILE, WIDTH, BLOCK)
        row, row_mask = hidden_rows(j, HIDDEN, BLOCK, BLOCK_J)
        row += scratch * BLOCK * HIDDEN
        width_row, width_mask = width_rows(WIDTH, BLOCK, BLOCK_D)
        width_row += scratch * BLOCK * WIDTH
        back_r = tl.load(cot_r + width_row, mask=width_mask, other=0.0)
        back_z = tl.load(cot_z + width_row, mask=width_mask, other=0.0)
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            x = tl.load(x_rows + row, mask=row_mask, other=0.0)
            y = tl.load(y_rows + row, mask=row_mask, other=0.0)
            d = tl.arange(0, BLOCK_D)[None, :]
            inside = valid & (d < WIDTH)
            queries = tl.trans(tl.load(q + at + d, mask=inside, other=0.0))
            total += product(queries, tl.load(r_rows + row, mask=row_mask, other=0.0), PRECISION)
            keys = tl.trans(tl.load(k + at + d, mask=inside, other=0.0))
            total += product(keys, tl.load(cot_x + row, mask=row_mask, other=0.0), PRECISION)
            u = tl.load(u_last + width_row, mask=width_mask, other=0.0)
            total_last += product(tl.trans(tl.load(cot_u + row, mask=row_mask, other=0.0)), u, PRECISION)
        total_last += product(tl.trans(y), back_r, PRECISION)
        total_last += product(tl.trans(x), back_z, PRECISION)
    tl.store(cot_base + LAST + block, total_last, mask=mask)
    if DEPTH > 1:
        tl.store(cot_base + first_at, total, mask=first_mask)
