"""What the queries of a tile read. No tile needs another here, so all of a group run side by side.

One program per batch row, head and tile, from the states and scratch that `triton_advance.py` has left.
"""

from functools import partial

import triton
import triton.language as tl

from .triton_entries import entries
from .triton_math import activation, output
from .triton_tiles import (
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
def read_block(
    y, block, base_block, mask, rows,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y base + β (y d) + f (y s)` for one block of a matrix."""
    beta, f = row_coefficients(rows, BLOCK)
    r = beta * product(y, load(block, mask).to(y.dtype), PRECISION)
    if HAS_MOMENTUM:
        r += f * product(y, load(block + MOMENTUM, mask).to(y.dtype), PRECISION)
    if HAS_BASE:
        r += product(y, load(base_block, mask).to(y.dtype), PRECISION)
    return r


@triton.jit
def first_scores(queries, keys, grad, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """How much of each direction of the first layer each query finds."""
    return (product(queries, tl.trans(keys), PRECISION) * tl.load(grad + square(BLOCK))).to(queries.dtype)


@triton.jit
def first_read(
    q, at, valid, mixed, state, base, rows, wide, j,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Features of the queries, one hidden block of the first of two layers."""
    # Loaded again in each round, which costs fewer registers than to keep them.
    queries = load_tokens(q, at, valid, WIDTH, BLOCK_D)
    block, mask = first_block(state, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    base_block, _ = first_block(base, j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    r = read_block(
        queries, block, base_block, mask, rows, 2 * WIDTH * HIDDEN, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION
    )  # fmt: skip
    row, mask = hidden_rows(wide, U, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
    y, slope, _ = activation(r + product(mixed, load(row, mask), PRECISION), ACT)
    y = y.to(queries.dtype)
    if KEEP:
        row, _ = hidden_rows(wide, Y, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        tl.store(row, y, mask=mask)
        row, _ = hidden_rows(wide, R, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
        tl.store(row, slope.to(y.dtype), mask=mask)
    return y


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "programs"])
def read_kernel(
    q, k, grad, rows, base, weight, bias, states, wide, narrow, sums, scores_kept, out,
    num_tokens, num_tiles, first, programs, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Outputs; or with KEEP what the backward starts from: features, slopes, last pre-activations and scores."""
    MOMENTUM: tl.constexpr = DEPTH * WIDTH * HIDDEN
    index = tl.program_id(0).to(tl.int64)
    program, tile = index % programs, first + index // programs
    states += index * ((2 if HAS_MOMENTUM else 1) * MOMENTUM)
    base += program % H * MOMENTUM
    planes, lines = scratch_of(index, wide, narrow, DEPTH, HIDDEN, WIDTH, BLOCK, KEEP)
    series = program * DEPTH * num_tiles + tile
    last = series + (DEPTH - 1) * num_tiles
    at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
    queries = load_tokens(q, at, valid, WIDTH, BLOCK_D)
    mixed = queries
    if DEPTH > 1:
        keys = load_tokens(k, at, valid, WIDTH, BLOCK_D)
        mixed = first_scores(queries, keys, grad + series * BLOCK * BLOCK, BLOCK, PRECISION)
    r = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for j in tl.range(0, HIDDEN, BLOCK_J, disable_licm=True):
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
            y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
        else:
            y = first_read(
                q, at, valid, mixed, states, base, rows + series * 4 * BLOCK, planes, j,
                DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_MOMENTUM, PRECISION, KEEP,
            )  # fmt: skip
            row, row_mask = hidden_rows(planes, X, j, DEPTH, HIDDEN, BLOCK, BLOCK_J)
            x = load(row, row_mask)
        # A branch that is always taken: products in one block of the program share the compiler's choice of layout,
        # and that of this small square one would make every warp repeat the others.
        if num_tiles > 0:
            scores += product(y, tl.trans(x), PRECISION)
        block, mask = last_block(states, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        base_block, _ = last_block(base, j, DEPTH, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        r += read_block(
            y, block, base_block, mask, rows + last * 4 * BLOCK, MOMENTUM, BLOCK, HAS_BASE, HAS_MOMENTUM, PRECISION
        )  # fmt: skip
    weighted = (scores * tl.load(grad + last * BLOCK * BLOCK + square(BLOCK))).to(queries.dtype)
    row, mask = width_rows(lines, U_LAST, WIDTH, BLOCK, BLOCK_D)
    r += product(weighted, load(row, mask), PRECISION)
    if KEEP:
        row, mask = width_rows(sums + index * 4 * BLOCK * WIDTH, READ, WIDTH, BLOCK, BLOCK_D)
        tl.store(row, r, mask=mask)
        tl.store(scores_kept + index * BLOCK * BLOCK + square(BLOCK), scores)
    else:
        gamma, shift = load_norm(weight, bias, program % H, WIDTH, BLOCK_D, HAS_NORM)
        inside = (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
        queries = load_tokens(q, at, valid, WIDTH, BLOCK_D)
        o = output(queries.to(tl.float32), r, gamma, shift, inside, eps, WIDTH, HAS_NORM)
        store_tokens(out, at, valid, o, WIDTH, BLOCK_D)


compile_entries = partial(entries, {"read": (read_kernel, True)})
