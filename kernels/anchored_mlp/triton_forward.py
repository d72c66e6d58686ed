"""The walk over tiles, forwards: gradients at the tile's start, read of the running memory, fold.

One program per batch row and head. float32 masters stay in global memory, where they live in L2; each tile of tokens
reads them twice (directions of the last layer first, then everything else) and writes them once.
"""

import triton
import triton.language as tl

from .triton_math import activation, descent, output
from .triton_tiles import (
    column_block,
    first_block,
    last_block,
    load,
    load_memory,
    load_norm,
    load_state,
    memory_of,
    product,
    read_running,
    row_coefficients,
    square,
    token_rows,
    width_rows,
)


@triton.jit
def last_preactivation(
    k, at, valid, keys, state, base,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the last matrix makes of the keys, `[BLOCK, BLOCK_D]`, at the tile's starting memory."""
    LAST: tl.constexpr = (DEPTH - 1) * WIDTH * HIDDEN
    dtype = keys.dtype
    z = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for j in range(0, HIDDEN, BLOCK_J):
        if DEPTH == 1:
            x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
        else:
            block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            m = load_memory(state, base, block, mask, HAS_BASE)
            x, _, _ = activation(product(keys, m.to(dtype), PRECISION), ACT)
            x = x.to(dtype)
        block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
        m = load_memory(state + LAST, base + LAST, block, mask, HAS_BASE)
        z += product(x, m.to(dtype), PRECISION)
    return z


@triton.jit
def fold_block(
    state, block, mask, d, s, x, u, rows, ends,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`d' = β d + f s + Σ G_s x_sᵀ u_s`, `s' = m s + Σ N_s x_sᵀ u_s`, stored over the block."""
    dtype = u.dtype
    _, _, write, write_momentum = row_coefficients(rows, BLOCK)
    after = tl.load(ends) * d + product(tl.trans((write * x).to(dtype)), u, PRECISION)
    if HAS_MOMENTUM:
        after += tl.load(ends + 1) * s
        momentum = tl.load(ends + 2) * s + product(tl.trans((write_momentum * x).to(dtype)), u, PRECISION)
        tl.store(state + MOMENTUM + block, momentum, mask=mask)
    tl.store(state + block, after, mask=mask)


@triton.jit
def keep_block(kept, block, mask, d, s, MOMENTUM: tl.constexpr, HAS_MOMENTUM: tl.constexpr):
    tl.store(kept + block, d.to(kept.dtype.element_ty), mask=mask)
    if HAS_MOMENTUM:
        tl.store(kept + MOMENTUM + block, s.to(kept.dtype.element_ty), mask=mask)


@triton.jit
def first_layer(
    q, keys, queries, u_last, m_last, mixed, state, base, kept, keeping, rows, ends, j,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
    ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One hidden block of the first of two layers: features of keys and queries; its columns are folded."""
    MOMENTUM: tl.constexpr = 2 * WIDTH * HIDDEN
    dtype = keys.dtype
    block, mask = first_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
    d, s, w = load_state(state, base, block, mask, MOMENTUM, HAS_BASE, HAS_MOMENTUM)
    if keeping:
        keep_block(kept, block, mask, d, s, MOMENTUM, HAS_MOMENTUM)
    x, slope, _ = activation(product(keys, memory_of(d, w, HAS_BASE).to(dtype), PRECISION), ACT)
    u = (product(u_last, tl.trans(m_last), PRECISION) * slope).to(dtype)
    x = x.to(dtype)
    y = x
    if READ:
        beta, f, _, _ = row_coefficients(rows, BLOCK)
        r = read_running(queries, d, s, w, beta, f, HAS_BASE, HAS_MOMENTUM, PRECISION)
        y, _, _ = activation(r + product(mixed, u, PRECISION), ACT)
        y = y.to(dtype)
    fold_block(state, block, mask, d, s, keys, u, rows, ends, MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION)
    return x, y


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "first", "stop", "every"])
def advance_kernel(
    q, k, v, grad, rows, ends, base, weight, bias, state, out, kept, preactivation,
    num_tokens, num_tiles, first, stop, every, H, eps,
    DEPTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr, ACT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Tiles first..stop of every row and head.

    With READ, outputs are written; without, the last pre-activation of every tile. With KEEP, the state in front of
    every `every`-th tile is copied to `kept [., B, H, size]`.
    """
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    LAST: tl.constexpr = (DEPTH - 1) * MATRIX
    MOMENTUM: tl.constexpr = DEPTH * MATRIX
    SIZE: tl.constexpr = (2 if HAS_MOMENTUM else 1) * DEPTH * MATRIX
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    state += program * SIZE
    kept += program * SIZE
    base += program % H * DEPTH * MATRIX
    d_columns = tl.arange(0, BLOCK_D)[None, :]
    inside = d_columns < WIDTH
    gamma, shift = load_norm(weight, bias, program % H, WIDTH, BLOCK_D, HAS_NORM)
    dtype = k.dtype.element_ty
    for tile in range(first, stop):
        at, valid = token_rows(program, tile, num_tokens, H, TILE, WIDTH, BLOCK)
        keeping = KEEP and (tile - first) % every == 0
        kept_here = kept + (tile - first) // every * programs * SIZE
        keys = tl.load(k + at + d_columns, mask=valid & inside, other=0.0)
        z = last_preactivation(
            k, at, valid, keys, state, base,
            DEPTH, WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, PRECISION,
        )  # fmt: skip
        queries = keys
        u = descent(z, keys.to(tl.float32), load(v + at, d_columns, valid & inside), gamma, shift, inside, eps, WIDTH, HAS_NORM)
        u = u.to(dtype)
        if not READ:
            row, mask = width_rows(WIDTH, BLOCK, BLOCK_D)
            tl.store(preactivation + ((tile - first) * programs + program) * BLOCK * WIDTH + row, z, mask=mask)
        series = program * DEPTH * num_tiles + tile
        last = series + (DEPTH - 1) * num_tiles
        mixed = keys
        if READ:
            queries = tl.load(q + at + d_columns, mask=valid & inside, other=0.0)
            if DEPTH > 1:
                mixed = product(queries, tl.trans(keys), PRECISION)
                mixed = (mixed * tl.load(grad + series * BLOCK * BLOCK + square(BLOCK))).to(dtype)
        r = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        scores = tl.zeros([BLOCK, BLOCK], tl.float32)
        for j in range(0, HIDDEN, BLOCK_J):
            block, mask = last_block(j, WIDTH, HIDDEN, BLOCK_D, BLOCK_J)
            d, s, w = load_state(state + LAST, base + LAST, block, mask, MOMENTUM, HAS_BASE, HAS_MOMENTUM)
            if keeping:
                keep_block(kept_here + LAST, block, mask, d, s, MOMENTUM, HAS_MOMENTUM)
            if DEPTH == 1:
                x = column_block(k, at, valid, j, HIDDEN, BLOCK_J)
                y = column_block(q, at, valid, j, HIDDEN, BLOCK_J)
            else:
                x, y = first_layer(
                    q, keys, queries, u, memory_of(d, w, HAS_BASE).to(dtype), mixed, state, base, kept_here, keeping,
                    rows + series * 4 * BLOCK, ends + series * 4, j,
                    WIDTH, HIDDEN, BLOCK, BLOCK_D, BLOCK_J, ACT, HAS_BASE, HAS_MOMENTUM, READ, PRECISION,
                )  # fmt: skip
            if READ:
                beta, f, _, _ = row_coefficients(rows + last * 4 * BLOCK, BLOCK)
                r += read_running(y, d, s, w, beta, f, HAS_BASE, HAS_MOMENTUM, PRECISION)
                scores += product(y, tl.trans(x), PRECISION)
            fold_block(
                state + LAST, block, mask, d, s, x, u, rows + last * 4 * BLOCK, ends + last * 4,
                MOMENTUM, BLOCK, HAS_MOMENTUM, PRECISION,
            )  # fmt: skip
        if READ:
            scores = (scores * tl.load(grad + last * BLOCK * BLOCK + square(BLOCK))).to(dtype)
            r += product(scores, u, PRECISION)
            o = output(queries.to(tl.float32), r, gamma, shift, inside, eps, WIDTH, HAS_NORM)
            tl.store(out + at + d_columns, o.to(out.dtype.element_ty), mask=valid & inside)
        tl.debug_barrier()
