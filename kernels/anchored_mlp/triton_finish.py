"""What is left of a group's backward once the reverse walk has gone over it; nothing here waits for another tile.

`keys_kernel`, one program per batch row, head and tile: gradients of the keys, and of β, f and m of the last token.
`base_kernel`, one program per batch row, head and block of the hidden width: gradients of the base, summed over tiles.
"""

from functools import partial

import triton
import triton.language as tl

from .triton_entries import entries
from .triton_tiles import (
    COT_K,
    COT_R,
    COT_U,
    COT_X,
    COT_Z,
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
    load_first,
    load_float,
    load_tokens,
    product,
    row_coefficients,
    scratch_of,
    store_tokens,
    token_rows,
    width_rows,
)


@triton.jit
def end_products(block, cot_block, mask, MOMENTUM: tl.constexpr, HAS_MOMENTUM: tl.constexpr):
    """One block's parts of the gradients of keep, pull and carry, summed over its columns."""
    g = load(cot_block, mask)
    keep = tl.sum(g * load(block, mask), axis=1)
    pull = tl.zeros_like(keep)
    carry = pull
    if HAS_MOMENTUM:
        s = load(block + MOMENTUM, mask)
        pull = tl.sum(g * s, axis=1)
        carry = tl.sum(load(cot_block + MOMENTUM, mask) * s, axis=1)
    return keep, pull, carry


@triton.jit
def store_ends(cot_ends, keep, pull, carry):
    tl.store(cot_ends, tl.sum(keep))
    tl.store(cot_ends + 1, tl.sum(pull))
    tl.store(cot_ends + 2, tl.sum(carry))
    tl.store(cot_ends + 3, 0.0)


@triton.jit
def first_keys(
    state, base, cot_state, rows, wide, j,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one hidden block of the first of two layers hands to the keys: by its pre-activation and by its fold."""
    row, row_mask = hidden_rows(wide, COT_X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    cot = load(row, row_mask)
    m = load_first(state, base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J, HAS_BASE).to(cot.dtype)
    total = product(cot, tl.trans(m), PRECISION)
    write, write_momentum = row_coefficients(rows + 2 * BLOCK, BLOCK)
    row, _ = hidden_rows(wide, U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    u = load(row, row_mask)
    block, mask = first_block(cot_state, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    total += product((write * u).to(cot.dtype), tl.trans(load(block, mask).to(cot.dtype)), PRECISION)
    if HAS_MOMENTUM:
        g = load(block + DEPTH * WIDTH * HIDDEN, mask).to(cot.dtype)
        total += product((write_momentum * u).to(cot.dtype), tl.trans(g), PRECISION)
    return total


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "programs"])
def keys_kernel(
    rows, base, states, cot_states, wide, sums, cot_v, cot_k, cot_ends, num_tokens, num_tiles, first, programs, H,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys, and of β, f and m of the last token of each tile."""
    MOMENTUM: tl.constexpr = DEPTH * WIDTH * HIDDEN
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * MOMENTUM
    index = tl.program_id(0).to(tl.int64)
    program, tile = index % programs, first + index // programs
    base += program % H * MOMENTUM
    states += index * SIZE
    cot_states += (index + programs) * SIZE
    planes = scratch_of(index, wide, wide, DEPTH, HIDDEN, WIDTH, BLOCK, True)[0]
    series = program * DEPTH * num_tiles + tile
    last = series + (DEPTH - 1) * num_tiles
    if DEPTH == 1:
        row, row_mask = hidden_rows(planes, COT_X, 0, DEPTH, HIDDEN, BLOCK, BLOCK_D)
    else:
        row, row_mask = width_rows(sums + index * 4 * BLOCK * WIDTH, COT_K, WIDTH, BLOCK, BLOCK_D)
    total = load_float(row, row_mask)
    keep = tl.zeros([BLOCK_D], tl.float32)
    pull = tl.zeros([BLOCK_D], tl.float32)
    carry = tl.zeros([BLOCK_D], tl.float32)
    keep_last = tl.zeros([BLOCK_J], tl.float32)
    pull_last = tl.zeros([BLOCK_J], tl.float32)
    carry_last = tl.zeros([BLOCK_J], tl.float32)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        block, mask = last_block(states, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        cot_block, _ = last_block(cot_states, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        a, b, c = end_products(block, cot_block, mask, MOMENTUM, HAS_MOMENTUM)
        keep_last += a
        pull_last += b
        carry_last += c
        if DEPTH > 1:
            block, mask = first_block(states, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            cot_block, _ = first_block(cot_states, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            a, b, c = end_products(block, cot_block, mask, MOMENTUM, HAS_MOMENTUM)
            keep += a
            pull += b
            carry += c
            total += first_keys(
                states, base, cot_states, rows + series * 4 * BLOCK, planes, j,
                DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, HAS_BASE, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
    store_ends(cot_ends + last * 4, keep_last, pull_last, carry_last)
    if DEPTH > 1:
        store_ends(cot_ends + series * 4, keep, pull, carry)
    at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
    if HAS_NORM:
        total -= load_tokens(cot_v, at, valid, WIDTH, BLOCK_D).to(tl.float32)
    store_tokens(cot_k, at, valid, total, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "first", "count", "programs"])
def base_kernel(
    q, k, wide, narrow, cot_base, num_tokens, first, count, programs, H,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the tiles of a group to `cot_base [B, H, size]`."""
    index = tl.program_id(0).to(tl.int64)
    program, j = index % programs, (index // programs).to(tl.int32) * BLOCK_J
    cot_base += program * DEPTH * WIDTH * HIDDEN
    block, mask = last_block(cot_base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    total_last = load(block, mask)
    first_at, first_mask = first_block(cot_base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    total = total_last
    if DEPTH > 1:
        total = load(first_at, first_mask)
    for step in tl.range(0, count, disable_licm=True):
        planes, lines = scratch_of(step * programs + program, wide, narrow, DEPTH, HIDDEN, WIDTH, BLOCK, True)
        at, valid = token_rows(program, first + step, num_tokens, H, TILE, WIDTH, BLOCK)
        row, row_mask = hidden_rows(planes, X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            x = load(row, row_mask)
            row, _ = hidden_rows(planes, R, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            queries = load_tokens(q, at, valid, WIDTH, BLOCK_D)
            total += product(tl.trans(queries), load(row, row_mask), PRECISION)
            row, _ = hidden_rows(planes, COT_X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            keys = load_tokens(k, at, valid, WIDTH, BLOCK_D)
            total += product(tl.trans(keys), load(row, row_mask), PRECISION)
            row, _ = hidden_rows(planes, COT_U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            line, line_mask = width_rows(lines, U_LAST, WIDTH, BLOCK, BLOCK_D)
            total_last += product(tl.trans(load(row, row_mask)), load(line, line_mask), PRECISION)
            row, _ = hidden_rows(planes, Y, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            y = load(row, row_mask)
        line, line_mask = width_rows(lines, COT_R, WIDTH, BLOCK, BLOCK_D)
        total_last += product(tl.trans(y), load(line, line_mask), PRECISION)
        line, _ = width_rows(lines, COT_Z, WIDTH, BLOCK, BLOCK_D)
        total_last += product(tl.trans(x), load(line, line_mask), PRECISION)
    tl.store(block, total_last, mask=mask)
    if DEPTH > 1:
        tl.store(first_at, total, mask=first_mask)


compile_entries = partial(entries, {"keys": (keys_kernel, False), "base": (base_kernel, True)})
