"""The chain of `triton_chain.py` for states that do not fit registers: float32 masters stream through the L2 cache.

Float32 operands take three products each on tensor cores, whose parts fill the registers beside a state; a memory of
more than 128 rows fills them alone. Every block of a state is read twice and written once per tile.
"""

from functools import partial

import triton
import triton.language as tl

from .triton_call import compile_calls
from .triton_tiles import load_matrix, load_slots, store_matrix


@triton.jit
def copy_columns(source, target, column, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr):
    """Copy some columns of a matrix."""
    for i in range(0, K, KB):
        store_matrix(target, load_matrix(source, i, column, K, V, KB, CB), i, column, K, V, KB, CB)


@triton.jit
def _directions(
    k, v, w, f, u, base, at, d, s, row, head, tile, index, column, num_tokens, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    SOLVE: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U of a tile, from the states in front of it or the memory that it is anchored at."""
    if SOLVE:
        x = load_matrix(u + index * BLOCK * V, 0, column, BLOCK, V, BLOCK, CB).to(tl.float32)
        for i in range(0, K, KB):
            weights = load_matrix(w + index * BLOCK * K, 0, i, BLOCK, K, BLOCK, KB)
            block = load_matrix(d, i, column, K, V, KB, CB).to(weights.dtype)
            x -= tl.dot(weights, block, input_precision=PRECISION)
            if HAS_MOMENTUM:
                weights = load_matrix(f + index * BLOCK * K, 0, i, BLOCK, K, BLOCK, KB)
                block = load_matrix(s, i, column, K, V, KB, CB).to(weights.dtype)
                x -= tl.dot(weights, block, input_precision=PRECISION)
    else:
        x = load_slots(v, row, head, tile, column, num_tokens, H, V, TILE, BLOCK, CB).to(tl.float32)
        for i in range(0, K, KB):
            keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
            block = load_matrix(at, i, column, K, V, KB, CB).to(tl.float32)
            if HAS_BASE:
                block += load_matrix(base + head * K * V, i, column, K, V, KB, CB)
            x -= tl.dot(keys, block.to(keys.dtype), input_precision=PRECISION)
    return x.to(k.dtype.element_ty)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def chain_stream_kernel(
    k, v, w, f, u, base, rows, ends, anchored, offset, momentum, states, momenta, last_offset, last_momentum,
    num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr, SOLVE: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`chain_kernel`; `offset` and `momentum` are overwritten on the way."""
    columns = tl.cdiv(V, CB)
    column, series = tl.program_id(0) % columns * CB, (tl.program_id(0) // columns).to(tl.int64)
    row, head = series // H, series % H
    t = tl.arange(0, BLOCK)
    end = tl.load(anchored + row)
    d, s = offset + series * K * V, momentum
    if HAS_MOMENTUM:
        s = momentum + series * K * V
    for tile in range(num_tiles):
        index = series * num_tiles + tile
        copy_columns(d, states + index * K * V, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            copy_columns(s, momenta + index * K * V, column, K, V, KB, CB)
        if TILES_PER_CHUNK > 1 and tile * TILE == end:
            copy_columns(d, last_offset + series * K * V, column, K, V, KB, CB)
            if HAS_MOMENTUM:
                copy_columns(s, last_momentum + series * K * V, column, K, V, KB, CB)
        tl.debug_barrier()
        at = states + (index - tile % TILES_PER_CHUNK) * K * V
        x = _directions(
            k, v, w, f, u, base, at, d, s, row, head, tile, index, column, num_tokens, H,
            K, V, KB, CB, TILE, BLOCK, SOLVE, HAS_BASE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        store_matrix(u + index * BLOCK * V, x, 0, column, BLOCK, V, BLOCK, CB)
        weights = rows + index * 4 * BLOCK + t
        for i in range(0, K, KB):
            keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
            pushed = (tl.load(weights + 2 * BLOCK)[:, None] * keys).to(keys.dtype)
            after = tl.load(ends + index * 4) * load_matrix(d, i, column, K, V, KB, CB)
            after += tl.dot(tl.trans(pushed), x, input_precision=PRECISION)
            if HAS_MOMENTUM:
                moving = load_matrix(s, i, column, K, V, KB, CB)
                after += tl.load(ends + index * 4 + 1) * moving
                pushed = (tl.load(weights + 3 * BLOCK)[:, None] * keys).to(keys.dtype)
                moving = tl.load(ends + index * 4 + 2) * moving
                moving += tl.dot(tl.trans(pushed), x, input_precision=PRECISION)
                store_matrix(s, moving, i, column, K, V, KB, CB)
            store_matrix(d, after, i, column, K, V, KB, CB)
        tl.debug_barrier()
    if TILES_PER_CHUNK == 1 or end == num_tiles * TILE:
        copy_columns(d, last_offset + series * K * V, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            copy_columns(s, last_momentum + series * K * V, column, K, V, KB, CB)


@triton.jit
def _add_columns(source, target, column, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr):
    """Add some columns of a matrix to those of another."""
    for i in range(0, K, KB):
        total = load_matrix(target, i, column, K, V, KB, CB) + load_matrix(source, i, column, K, V, KB, CB)
        store_matrix(target, total, i, column, K, V, KB, CB)


@triton.jit
def _unread(
    q, k, w, f, cot, x, d, s, at, rows, ends, row, head, tile, index, column, num_tokens, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr, SOLVE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cotangents of the states in front of a tile in the place of those behind it.

    `at` gathers those of the memory that the tiles of a chunk are anchored at, until its first tile is reached.
    """
    first = tile % TILES_PER_CHUNK == 0
    for i in range(0, K, KB):
        queries = load_slots(q, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
        if SOLVE:
            keys = load_matrix(w + index * BLOCK * K, 0, i, BLOCK, K, BLOCK, KB)
        else:
            keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
        behind = load_matrix(d, i, column, K, V, KB, CB)
        before = tl.load(ends) * behind
        asked = (tl.load(rows)[:, None] * queries).to(queries.dtype)
        before += tl.dot(tl.trans(asked), cot, input_precision=PRECISION)
        anchor = -tl.dot(tl.trans(keys), x, input_precision=PRECISION)
        if TILES_PER_CHUNK > 1:
            anchor += load_matrix(at, i, column, K, V, KB, CB)
            store_matrix(at, tl.where(first, 0.0, anchor), i, column, K, V, KB, CB)
            anchor = tl.where(first, anchor, 0.0)
        store_matrix(d, before + anchor, i, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            moving = tl.load(ends + 1) * behind + tl.load(ends + 2) * load_matrix(s, i, column, K, V, KB, CB)
            asked = (tl.load(rows + BLOCK)[:, None] * queries).to(queries.dtype)
            moving += tl.dot(tl.trans(asked), cot, input_precision=PRECISION)
            if SOLVE:
                weights = load_matrix(f + index * BLOCK * K, 0, i, BLOCK, K, BLOCK, KB)
                moving -= tl.dot(tl.trans(weights), x, input_precision=PRECISION)
            store_matrix(s, moving, i, column, K, V, KB, CB)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def chain_stream_backward_kernel(
    q, k, w, f, cot_out, cot_u, rows, ends, anchored, cot_last_offset, cot_last_momentum,
    cot_states, cot_momenta, cot_offset, cot_momentum, cot_anchor, num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr, SOLVE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`chain_backward_kernel`; `cot_offset`, `cot_momentum` and `cot_anchor` start at zero."""
    columns = tl.cdiv(V, CB)
    column, series = tl.program_id(0) % columns * CB, (tl.program_id(0) // columns).to(tl.int64)
    row, head = series // H, series % H
    t = tl.arange(0, BLOCK)
    end = tl.load(anchored + row)
    state = series * K * V
    d, s, at = cot_offset + state, cot_momentum, cot_anchor
    if HAS_MOMENTUM:
        s = cot_momentum + state
    if TILES_PER_CHUNK > 1:
        at = cot_anchor + state
    if TILES_PER_CHUNK == 1 or end == num_tiles * TILE:
        _add_columns(cot_last_offset + state, d, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            _add_columns(cot_last_momentum + state, s, column, K, V, KB, CB)
    for step in range(num_tiles):
        tile = num_tiles - 1 - step
        index = series * num_tiles + tile
        tl.debug_barrier()
        copy_columns(d, cot_states + index * K * V, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            copy_columns(s, cot_momenta + index * K * V, column, K, V, KB, CB)
        cot = load_slots(cot_out, row, head, tile, column, num_tokens, H, V, TILE, BLOCK, CB)
        x = load_matrix(cot_u + index * BLOCK * V, 0, column, BLOCK, V, BLOCK, CB).to(tl.float32)
        weights = rows + index * 4 * BLOCK + t
        for i in range(0, K, KB):
            keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
            pushed = (tl.load(weights + 2 * BLOCK)[:, None] * keys).to(keys.dtype)
            x += tl.dot(pushed, load_matrix(d, i, column, K, V, KB, CB).to(keys.dtype), input_precision=PRECISION)
            if HAS_MOMENTUM:
                pushed = (tl.load(weights + 3 * BLOCK)[:, None] * keys).to(keys.dtype)
                block = load_matrix(s, i, column, K, V, KB, CB).to(keys.dtype)
                x += tl.dot(pushed, block, input_precision=PRECISION)
        x = x.to(k.dtype.element_ty)
        store_matrix(cot_u + index * BLOCK * V, x, 0, column, BLOCK, V, BLOCK, CB)
        tl.debug_barrier()
        _unread(
            q, k, w, f, cot, x, d, s, at, weights, ends + index * 4, row, head, tile, index, column, num_tokens, H,
            K, V, KB, CB, TILE, BLOCK, TILES_PER_CHUNK, SOLVE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        if TILES_PER_CHUNK > 1 and tile * TILE == end:
            tl.debug_barrier()
            _add_columns(cot_last_offset + state, d, column, K, V, KB, CB)
            if HAS_MOMENTUM:
                _add_columns(cot_last_momentum + state, s, column, K, V, KB, CB)


compile_entries = partial(compile_calls, (chain_stream_kernel, chain_stream_backward_kernel))
