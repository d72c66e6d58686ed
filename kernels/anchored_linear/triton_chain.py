"""The chain over tiles of the plain linear memory, forwards and backwards: what cannot run in parallel.

A program owns some columns of the memory of one head. States live in registers as float32 blocks of KB rows; the
copies that the parallel kernels read are in the dtype of the keys.
"""

from functools import partial

import triton
import triton.language as tl

from .triton_call import compile_calls
from .triton_tiles import load_matrix, load_slots, store_matrix


@triton.jit
def load_state(x, column, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr):
    """Columns of a matrix `[K, V]` as a tuple of `[KB, VB]` blocks."""
    blocks = ()
    for i in tl.static_range(0, K, KB):
        blocks = blocks + (load_matrix(x, i, column, K, V, KB, VB).to(tl.float32),)
    return blocks


@triton.jit
def store_state(x, blocks, column, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr):
    """Inverse of `load_state`."""
    for i in tl.static_range(len(blocks)):
        store_matrix(x, blocks[i], i * KB, column, K, V, KB, VB)


@triton.jit
def add_states(x, y):
    """Sum of two tuples of blocks."""
    total = ()
    for i in tl.static_range(len(x)):
        total = total + (x[i] + y[i],)
    return total


@triton.jit
def choose(condition, x, y):
    """Blocks of `x` where a scalar condition holds, else of `y`."""
    chosen = ()
    for i in tl.static_range(len(x)):
        chosen = chosen + (tl.where(condition, x[i], y[i]),)
    return chosen


@triton.jit
def zeros_like_state(x):
    zeros = ()
    for i in tl.static_range(len(x)):
        zeros = zeros + (tl.zeros_like(x[i]),)
    return zeros


@triton.jit
def _fold(
    k, x, d, s, rows, ends, row, head, tile, num_tokens, H,
    K: tl.constexpr, KB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D' = β D + f S + (G K)ᵀ U and S' = m S + (N K)ᵀ U, with the coefficients of the tile's last token."""
    t = tl.arange(0, BLOCK)
    write, keep = tl.load(rows + 2 * BLOCK + t)[:, None], tl.load(ends)
    after_d = ()
    after_s = ()
    for i in tl.static_range(len(d)):
        keys = load_slots(k, row, head, tile, i * KB, num_tokens, H, K, TILE, BLOCK, KB)
        after = keep * d[i] + tl.dot(tl.trans((write * keys).to(keys.dtype)), x, input_precision=PRECISION)
        if HAS_MOMENTUM:
            after += tl.load(ends + 1) * s[i]
            pushed = (tl.load(rows + 3 * BLOCK + t)[:, None] * keys).to(keys.dtype)
            after_s = after_s + (tl.load(ends + 2) * s[i] + tl.dot(tl.trans(pushed), x, input_precision=PRECISION),)
        else:
            after_s = after_s + (s[i],)
        after_d = after_d + (after,)
    return after_d, after_s


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def chain_kernel(
    k, v, w, f, u, base, rows, ends, anchored, offset, momentum, states, momenta, last_offset, last_momentum,
    num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr, SOLVE: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Directions U of every tile, and the states in front of it.

    With `SOLVE`, `u` holds its part that depends on no state and becomes U. Otherwise the gradients of a tile are all
    taken at one memory: the state in front of the tile, or of the first tile of its chunk. A chunk of several tiles
    is folded tile by tile; `anchored` says where the state that is carried out stands.
    """
    columns = tl.cdiv(V, CB)
    column, series = tl.program_id(0) % columns * CB, (tl.program_id(0) // columns).to(tl.int64)
    row, head = series // H, series % H
    d = load_state(offset + series * K * V, column, K, V, KB, CB)
    s = d
    if HAS_MOMENTUM:
        s = load_state(momentum + series * K * V, column, K, V, KB, CB)
    start = zeros_like_state(d)
    if HAS_BASE and not SOLVE:
        start = load_state(base + head * K * V, column, K, V, KB, CB)
    at = d
    end = tl.load(anchored + row)
    for tile in range(num_tiles):
        index = series * num_tiles + tile
        store_state(states + index * K * V, d, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            store_state(momenta + index * K * V, s, column, K, V, KB, CB)
        if SOLVE:
            x = load_matrix(u + index * BLOCK * V, 0, column, BLOCK, V, BLOCK, CB).to(tl.float32)
            for i in tl.static_range(len(d)):
                weights = load_matrix(w + index * BLOCK * K, 0, i * KB, BLOCK, K, BLOCK, KB)
                x -= tl.dot(weights, d[i].to(weights.dtype), input_precision=PRECISION)
                if HAS_MOMENTUM:
                    weights = load_matrix(f + index * BLOCK * K, 0, i * KB, BLOCK, K, BLOCK, KB)
                    x -= tl.dot(weights, s[i].to(weights.dtype), input_precision=PRECISION)
        else:
            at = choose(tile % TILES_PER_CHUNK == 0, d, at)
            if TILES_PER_CHUNK > 1 and tile * TILE == end:
                store_state(last_offset + series * K * V, d, column, K, V, KB, CB)
                if HAS_MOMENTUM:
                    store_state(last_momentum + series * K * V, s, column, K, V, KB, CB)
            x = load_slots(v, row, head, tile, column, num_tokens, H, V, TILE, BLOCK, CB).to(tl.float32)
            for i in tl.static_range(len(d)):
                keys = load_slots(k, row, head, tile, i * KB, num_tokens, H, K, TILE, BLOCK, KB)
                x -= tl.dot(keys, (at[i] + start[i]).to(keys.dtype), input_precision=PRECISION)
        x = x.to(k.dtype.element_ty)
        store_matrix(u + index * BLOCK * V, x, 0, column, BLOCK, V, BLOCK, CB)
        d, s = _fold(
            k, x, d, s, rows + index * 4 * BLOCK, ends + index * 4, row, head, tile, num_tokens, H,
            K, KB, TILE, BLOCK, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
    if TILES_PER_CHUNK == 1 or end == num_tiles * TILE:
        store_state(last_offset + series * K * V, d, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            store_state(last_momentum + series * K * V, s, column, K, V, KB, CB)


@triton.jit
def _load_cotangents(
    cot_offset, cot_momentum, arrives, column,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Cotangents of the state that is carried out, zero unless a scalar condition says that they arrive here."""
    d = ()
    s = ()
    r = tl.arange(0, KB)
    c = column + tl.arange(0, VB)
    for i in tl.static_range(0, K, KB):
        inside = (tl.where(arrives, i + r, K) < K)[:, None] & (c < V)[None, :]
        at = (i + r)[:, None] * V + c[None, :]
        d = d + (tl.load(cot_offset + at, mask=inside, other=0.0),)
        if HAS_MOMENTUM:
            s = s + (tl.load(cot_momentum + at, mask=inside, other=0.0),)
        else:
            s = s + (tl.zeros([KB, VB], tl.float32),)
    return d, s


@triton.jit
def _unread(
    q, k, w, f, cot, x, d, s, at, rows, ends, row, head, tile, num_tokens, H,
    K: tl.constexpr, KB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    SOLVE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cotangents of the states in front of a tile from those behind it, and that of the memory it is anchored at."""
    t = tl.arange(0, BLOCK)
    beta, keep = tl.load(rows + t)[:, None], tl.load(ends)
    before_d = ()
    before_s = ()
    before_at = ()
    for i in tl.static_range(len(d)):
        queries = load_slots(q, row, head, tile, i * KB, num_tokens, H, K, TILE, BLOCK, KB)
        if SOLVE:
            keys = load_matrix(w, 0, i * KB, BLOCK, K, BLOCK, KB)
        else:
            keys = load_slots(k, row, head, tile, i * KB, num_tokens, H, K, TILE, BLOCK, KB)
        asked = (beta * queries).to(queries.dtype)
        before_d = before_d + (keep * d[i] + tl.dot(tl.trans(asked), cot, input_precision=PRECISION),)
        before_at = before_at + (at[i] - tl.dot(tl.trans(keys), x, input_precision=PRECISION),)
        if HAS_MOMENTUM:
            asked = (tl.load(rows + BLOCK + t)[:, None] * queries).to(queries.dtype)
            before = tl.load(ends + 1) * d[i] + tl.load(ends + 2) * s[i]
            before += tl.dot(tl.trans(asked), cot, input_precision=PRECISION)
            if SOLVE:
                weights = load_matrix(f, 0, i * KB, BLOCK, K, BLOCK, KB)
                before -= tl.dot(tl.trans(weights), x, input_precision=PRECISION)
            before_s = before_s + (before,)
        else:
            before_s = before_s + (s[i],)
    return before_d, before_s, before_at


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def chain_backward_kernel(
    q, k, w, f, cot_out, cot_u, rows, ends, anchored, cot_last_offset, cot_last_momentum,
    cot_states, cot_momenta, cot_offset, cot_momentum, num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr, SOLVE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of U (`cot_u` holds the part that outputs bring), and cotangents of the states behind every tile."""
    columns = tl.cdiv(V, CB)
    column, series = tl.program_id(0) % columns * CB, (tl.program_id(0) // columns).to(tl.int64)
    row, head = series // H, series % H
    end = tl.load(anchored + row)
    cot_last_offset += series * K * V
    if HAS_MOMENTUM:
        cot_last_momentum += series * K * V
    d, s = _load_cotangents(
        cot_last_offset, cot_last_momentum, TILES_PER_CHUNK == 1 or end == num_tiles * TILE, column,
        K, V, KB, CB, HAS_MOMENTUM,
    )  # fmt: skip
    at = zeros_like_state(d)
    t = tl.arange(0, BLOCK)
    for step in range(num_tiles):
        tile = num_tiles - 1 - step
        index = series * num_tiles + tile
        store_state(cot_states + index * K * V, d, column, K, V, KB, CB)
        if HAS_MOMENTUM:
            store_state(cot_momenta + index * K * V, s, column, K, V, KB, CB)
        cot = load_slots(cot_out, row, head, tile, column, num_tokens, H, V, TILE, BLOCK, CB)
        x = load_matrix(cot_u + index * BLOCK * V, 0, column, BLOCK, V, BLOCK, CB).to(tl.float32)
        write = tl.load(rows + index * 4 * BLOCK + 2 * BLOCK + t)[:, None]
        for i in tl.static_range(len(d)):
            keys = load_slots(k, row, head, tile, i * KB, num_tokens, H, K, TILE, BLOCK, KB)
            x += tl.dot((write * keys).to(keys.dtype), d[i].to(keys.dtype), input_precision=PRECISION)
            if HAS_MOMENTUM:
                pushed = (tl.load(rows + index * 4 * BLOCK + 3 * BLOCK + t)[:, None] * keys).to(keys.dtype)
                x += tl.dot(pushed, s[i].to(keys.dtype), input_precision=PRECISION)
        x = x.to(k.dtype.element_ty)
        store_matrix(cot_u + index * BLOCK * V, x, 0, column, BLOCK, V, BLOCK, CB)
        d, s, at = _unread(
            q, k, w + index * BLOCK * K if SOLVE else w, f + index * BLOCK * K if SOLVE and HAS_MOMENTUM else f,
            cot, x, d, s, at, rows + index * 4 * BLOCK, ends + index * 4, row, head, tile, num_tokens, H,
            K, KB, TILE, BLOCK, SOLVE, HAS_MOMENTUM, PRECISION,
        )  # fmt: skip
        first = tile % TILES_PER_CHUNK == 0
        d = choose(first, add_states(d, at), d)
        at = choose(first, zeros_like_state(at), at)
        if TILES_PER_CHUNK > 1:
            more_d, more_s = _load_cotangents(
                cot_last_offset, cot_last_momentum, tile * TILE == end, column, K, V, KB, CB, HAS_MOMENTUM
            )
            d, s = add_states(d, more_d), add_states(s, more_s)
    store_state(cot_offset + series * K * V, d, column, K, V, KB, CB)
    if HAS_MOMENTUM:
        store_state(cot_momentum + series * K * V, s, column, K, V, KB, CB)


compile_entries = partial(compile_calls, (chain_kernel, chain_backward_kernel))
