"""What runs in parallel over the tiles of the plain linear memory: outputs, and gradients given all states."""

from functools import partial

import triton
import triton.language as tl

from .triton_call import compile_calls
from .triton_tiles import (
    anchor_of,
    load_anchored,
    load_matrix,
    load_slots,
    scatter_anchored,
    solve,
    store_matrix,
    store_slots,
    tile_of,
)


@triton.jit
def _scores(
    q, k, grad, row, head, tile, num_tokens, H,
    K: tl.constexpr, KB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`q_t . k_s` and G of a tile."""
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, K, KB):
        queries = load_slots(q, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
        keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
        scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    return scores, load_matrix(grad, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def output_kernel(
    q, k, u, base, grad, rows, states, momenta, out, num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = Q base + β Q D + f Q S + (Q Kᵀ ∘ G) U."""
    columns = tl.cdiv(V, VB)
    column = tl.program_id(0) % columns * VB
    program = tl.program_id(0) // columns
    tile, series = program % num_tiles, (program // num_tiles).to(tl.int64)
    row, head, index = series // H, series % H, program.to(tl.int64)
    t = tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK, VB], tl.float32)
    moving = tl.zeros([BLOCK, VB], tl.float32)
    fixed = tl.zeros([BLOCK, VB], tl.float32)
    for i in range(0, K, KB):
        queries = load_slots(q, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
        d = load_matrix(states + index * K * V, i, column, K, V, KB, VB)
        y += tl.dot(queries, d, input_precision=PRECISION)
        if HAS_MOMENTUM:
            s = load_matrix(momenta + index * K * V, i, column, K, V, KB, VB)
            moving += tl.dot(queries, s, input_precision=PRECISION)
        if HAS_BASE:
            start = load_matrix(base + head * K * V, i, column, K, V, KB, VB).to(queries.dtype)
            fixed += tl.dot(queries, start, input_precision=PRECISION)
    y = tl.load(rows + index * 4 * BLOCK + t)[:, None] * y + fixed
    if HAS_MOMENTUM:
        y += tl.load(rows + index * 4 * BLOCK + BLOCK + t)[:, None] * moving
    scores, g = _scores(
        q, k, grad + index * BLOCK * BLOCK, row, head, tile, num_tokens, H, K, KB, TILE, BLOCK, PRECISION
    )
    x = load_matrix(u + index * BLOCK * V, 0, column, BLOCK, V, BLOCK, VB)
    y += tl.dot((scores * g).to(x.dtype), x, input_precision=PRECISION)
    store_slots(out, y, row, head, tile, column, num_tokens, H, V, TILE, BLOCK, VB)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def output_backward_kernel(
    q, k, grad, cot_out, cot_u, num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of U that the outputs of its own tile bring, `(Q Kᵀ ∘ G)ᵀ Ȳ`."""
    tile, series, row, head = tile_of(num_tiles, H)
    index = series * num_tiles + tile
    scores, g = _scores(
        q, k, grad + index * BLOCK * BLOCK, row, head, tile, num_tokens, H, K, KB, TILE, BLOCK, PRECISION
    )
    weights = tl.trans(scores * g).to(q.dtype.element_ty)
    for j in range(0, V, VB):
        cot = load_slots(cot_out, row, head, tile, j, num_tokens, H, V, TILE, BLOCK, VB)
        x = tl.dot(weights, cot, input_precision=PRECISION)
        store_matrix(cot_u + index * BLOCK * V, x, 0, j, BLOCK, V, BLOCK, VB)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def tile_gradients_kernel(
    q, k, u, cot_out, cot_u, system, inverse, grad, rows, cot_v, cot_grad, weights_out, gram_out,
    num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, AT_DECAYED: tl.constexpr, SOLVE: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that live on a tile: of values, of G, and the two [n, n] factors that keys and queries need.

    With R̄ = (I + L)⁻ᵀ Ū the gradient of the right side: V̄ = R̄, L̄ = -R̄ Uᵀ, Ḡ = Ȳ Uᵀ ∘ Q Kᵀ and, at row c(t), L̄ ∘ K Kᵀ.
    `weights` is Ȳ Uᵀ ∘ G, `gram` the gradient of K Kᵀ, symmetrised.
    """
    tile, series, row, head = tile_of(num_tiles, H)
    index = series * num_tiles + tile
    REFINE: tl.constexpr = k.dtype.element_ty == tl.float32
    t = tl.arange(0, BLOCK)
    cot_weights = tl.zeros([BLOCK, BLOCK], tl.float32)
    cot_system = tl.zeros([BLOCK, BLOCK], tl.float32)
    if SOLVE:
        back = tl.trans(load_matrix(inverse + index * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK))
        mixed = back
        if REFINE:
            mixed = tl.trans(load_matrix(system + index * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK))
    for j in range(0, V, VB):
        cot = load_slots(cot_out, row, head, tile, j, num_tokens, H, V, TILE, BLOCK, VB)
        x = load_matrix(u + index * BLOCK * V, 0, j, BLOCK, V, BLOCK, VB)
        r = load_matrix(cot_u + index * BLOCK * V, 0, j, BLOCK, V, BLOCK, VB)
        cot_weights += tl.dot(cot, tl.trans(x), input_precision=PRECISION)
        if SOLVE:
            r = solve(back, mixed, r, REFINE, PRECISION).to(x.dtype)
            cot_system -= tl.dot(r, tl.trans(x), input_precision=PRECISION)
        store_slots(cot_v, r, row, head, tile, j, num_tokens, H, V, TILE, BLOCK, VB)
    scores, g = _scores(
        q, k, grad + index * BLOCK * BLOCK, row, head, tile, num_tokens, H, K, KB, TILE, BLOCK, PRECISION
    )
    store_matrix(weights_out + index * BLOCK * BLOCK, cot_weights * g, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    cot_g = cot_weights * scores
    if SOLVE:
        gram = tl.zeros([BLOCK, BLOCK], tl.float32)
        for i in range(0, K, KB):
            keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
            gram += tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        c = anchor_of(t, CHUNK, AT_DECAYED)
        _, _, anchored = load_anchored(
            grad + index * BLOCK * BLOCK, rows + index * 4 * BLOCK, BLOCK, CHUNK, AT_DECAYED
        )
        cot_gram = cot_system * anchored
        cot_gram += tl.trans(cot_gram)
        store_matrix(gram_out + index * BLOCK * BLOCK, cot_gram, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
        cot_anchored = tl.where(t[None, :] < t[:, None], cot_system * gram, 0.0)
        picked = tl.where(c[None, :] == t[:, None], 1.0, 0.0)
        cot_g += tl.dot(picked, cot_anchored, input_precision=SOLVE_PRECISION)
    store_matrix(cot_grad + index * BLOCK * BLOCK, cot_g, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)


@triton.jit
def _back(
    x, matrix, i, j, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows `x [BLOCK, VB]` through the transpose of a block of a matrix, `[BLOCK, KB]`."""
    block = load_matrix(matrix, i, j, K, V, KB, VB).to(x.dtype)
    return tl.dot(x, tl.trans(block), input_precision=PRECISION)


@triton.jit
def _product(x, y, i, j, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr):
    """Sum of the products of two matrices' entries in a block."""
    a = load_matrix(x, i, j, K, V, KB, VB).to(tl.float32)
    return tl.sum(a * load_matrix(y, i, j, K, V, KB, VB).to(tl.float32))


@triton.jit
def _store_coefficients(rows, ends, place, t, beta, f, write, write_s, keep, pull, carry, BLOCK: tl.constexpr):
    """Gradients of `rows` and `ends` from one block of the memory's rows, in the layout of the coefficients."""
    rows += place * 4 * BLOCK + t
    tl.store(rows, beta)
    tl.store(rows + BLOCK, f)
    tl.store(rows + 2 * BLOCK, write)
    tl.store(rows + 3 * BLOCK, write_s)
    ends += place * 4
    tl.store(ends, keep)
    tl.store(ends + 1, pull)
    tl.store(ends + 2, carry)
    tl.store(ends + 3, 0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def operand_gradients_kernel(
    q, k, u, cot_out, cot_v, base, rows, states, momenta, cot_states, cot_momenta, weights, gram,
    cot_q, cot_k, cot_rows, cot_ends, num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, GB: tl.constexpr, GV: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, AT_DECAYED: tl.constexpr, TILES_PER_CHUNK: tl.constexpr, SOLVE: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some columns of queries and keys, and their part of those of `rows` and `ends`."""
    blocks = tl.cdiv(K, GB)
    i = tl.program_id(0) % blocks * GB
    program = tl.program_id(0) // blocks
    tile, series = program % num_tiles, (program // num_tiles).to(tl.int64)
    row, head, index = series // H, series % H, program.to(tl.int64)
    t = tl.arange(0, BLOCK)
    d, s = states + index * K * V, momenta
    after_d, after_s = cot_states + index * K * V, cot_momenta
    at = states + (index - tile % TILES_PER_CHUNK) * K * V
    start = base
    if HAS_MOMENTUM:
        s, after_s = momenta + index * K * V, cot_momenta + index * K * V
    if HAS_BASE:
        start = base + head * K * V
    c = anchor_of(t, CHUNK, AT_DECAYED)
    rows += index * 4 * BLOCK + t
    mixed = load_matrix(weights + index * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    queries = load_slots(q, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, GB)
    keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, GB)
    zeros = tl.zeros([BLOCK, GB], tl.float32)

    asked, asked_s, asked_base = zeros, zeros, zeros
    for j in range(0, V, GV):
        cot = load_slots(cot_out, row, head, tile, j, num_tokens, H, V, TILE, BLOCK, GV)
        asked += _back(cot, d, i, j, K, V, GB, GV, PRECISION)
        if HAS_MOMENTUM:
            asked_s += _back(cot, s, i, j, K, V, GB, GV, PRECISION)
        if HAS_BASE:
            asked_base += _back(cot, start, i, j, K, V, GB, GV, PRECISION)
    cot_queries = tl.load(rows)[:, None] * asked + tl.load(rows + BLOCK)[:, None] * asked_s + asked_base
    cot_queries += tl.dot(mixed, keys, input_precision=PRECISION)
    store_slots(cot_q, cot_queries, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, GB)
    cot_beta, cot_f = tl.sum(queries * asked, 1), tl.sum(queries * asked_s, 1)

    written, written_s = zeros, zeros
    keep, pull, carry = 0.0, 0.0, 0.0
    for j in range(0, V, GV):
        x = load_matrix(u + index * BLOCK * V, 0, j, BLOCK, V, BLOCK, GV)
        written += _back(x, after_d, i, j, K, V, GB, GV, PRECISION)
        keep += _product(d, after_d, i, j, K, V, GB, GV)
        if HAS_MOMENTUM:
            written_s += _back(x, after_s, i, j, K, V, GB, GV, PRECISION)
            pull += _product(s, after_d, i, j, K, V, GB, GV)
            carry += _product(s, after_s, i, j, K, V, GB, GV)
    cot_keys = tl.load(rows + 2 * BLOCK)[:, None] * written + tl.load(rows + 3 * BLOCK)[:, None] * written_s
    cot_keys += tl.dot(tl.trans(mixed), queries, input_precision=PRECISION)
    cot_write, cot_write_s = tl.sum(keys * written, 1), tl.sum(keys * written_s, 1)

    missed, missed_s, missed_base = zeros, zeros, zeros
    for j in range(0, V, GV):
        r = load_slots(cot_v, row, head, tile, j, num_tokens, H, V, TILE, BLOCK, GV)
        missed += _back(r, at, i, j, K, V, GB, GV, PRECISION)
        if HAS_MOMENTUM and SOLVE:
            missed_s += _back(r, s, i, j, K, V, GB, GV, PRECISION)
        if HAS_BASE:
            missed_base += _back(r, start, i, j, K, V, GB, GV, PRECISION)
    cot_keys -= missed_base
    if SOLVE:
        cot_keys -= tl.load(rows - t + c, mask=c >= 0, other=1.0)[:, None] * missed
        cot_keys -= tl.load(rows - t + c + BLOCK, mask=c >= 0, other=0.0)[:, None] * missed_s
        mixed = load_matrix(gram + index * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
        cot_keys += tl.dot(mixed, keys, input_precision=PRECISION)
        cot_beta += scatter_anchored(-tl.sum(keys * missed, 1), BLOCK, CHUNK, AT_DECAYED)
        cot_f += scatter_anchored(-tl.sum(keys * missed_s, 1), BLOCK, CHUNK, AT_DECAYED)
    else:
        cot_keys -= missed
    store_slots(cot_k, cot_keys, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, GB)

    place = tl.program_id(0).to(tl.int64)
    _store_coefficients(
        cot_rows, cot_ends, place, t, cot_beta, cot_f, cot_write, cot_write_s, keep, pull, carry, BLOCK
    )


compile_entries = partial(
    compile_calls, (output_kernel, output_backward_kernel, tile_gradients_kernel, operand_gradients_kernel)
)
