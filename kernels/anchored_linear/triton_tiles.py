"""Tiles of the plain linear memory: loads and stores, the system of a tile, and its solution."""

from functools import partial

import triton
import triton.language as tl

from .triton_call import compile_calls


@triton.jit
def tile_of(num_tiles, H):
    """`(tile, series, row, head)` of a program; a series is one head of one row."""
    program = tl.program_id(0)
    series = program // num_tiles
    return program % num_tiles, series.to(tl.int64), (series // H).to(tl.int64), series % H


@triton.jit
def load_slots(
    x, row, head, tile, first, num_tokens, H, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr
):
    """`[BLOCK, W]` of slots `[B, S, H, D]`: tokens of a tile, columns from `first` on, zero where there are none."""
    t = tl.arange(0, BLOCK)
    c = first + tl.arange(0, W)
    slot = tile * TILE + t
    at = ((row * num_tokens + slot) * H + head) * D
    inside = ((t < TILE) & (slot < num_tokens))[:, None] & (c < D)[None, :]
    return tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0)


@triton.jit
def store_slots(
    x, value, row, head, tile, first, num_tokens, H,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Inverse of `load_slots`."""
    t = tl.arange(0, BLOCK)
    c = first + tl.arange(0, W)
    slot = tile * TILE + t
    at = ((row * num_tokens + slot) * H + head) * D
    inside = ((t < TILE) & (slot < num_tokens))[:, None] & (c < D)[None, :]
    tl.store(x + at[:, None] + c[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_matrix(x, first_row, first_column, R: tl.constexpr, C: tl.constexpr, HEIGHT: tl.constexpr, W: tl.constexpr):
    """`[HEIGHT, W]` of a matrix `[R, C]`, zero outside."""
    r = first_row + tl.arange(0, HEIGHT)
    c = first_column + tl.arange(0, W)
    return tl.load(x + r[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def store_matrix(
    x, value, first_row, first_column, R: tl.constexpr, C: tl.constexpr, HEIGHT: tl.constexpr, W: tl.constexpr
):
    """Inverse of `load_matrix`."""
    r = first_row + tl.arange(0, HEIGHT)
    c = first_column + tl.arange(0, W)
    inside = (r < R)[:, None] & (c < C)[None, :]
    tl.store(x + r[:, None] * C + c[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def anchor_of(t, CHUNK: tl.constexpr, AT_DECAYED: tl.constexpr):
    """Token at whose memory the gradient of token t is taken, -1 for the start of the tile.

    At the decayed memory (grid 1, no momentum) a_t M_{t-1} is row t without its own gradient.
    """
    if AT_DECAYED:
        return t
    return t - t % CHUNK - 1


@triton.jit
def load_anchored(grad, rows, BLOCK: tl.constexpr, CHUNK: tl.constexpr, AT_DECAYED: tl.constexpr):
    """Rows c(t) of the coefficients: `β_c, f_c [BLOCK]` and `G[c(t), s] [BLOCK, BLOCK]`, strictly lower."""
    t = tl.arange(0, BLOCK)
    c = anchor_of(t, CHUNK, AT_DECAYED)
    beta = tl.load(rows + c, mask=c >= 0, other=1.0)
    f = tl.load(rows + BLOCK + c, mask=c >= 0, other=0.0)
    inside = (c >= 0)[:, None] & (t[None, :] < t[:, None])
    return beta, f, tl.load(grad + c[:, None] * BLOCK + t[None, :], mask=inside, other=0.0)


@triton.jit
def scatter_anchored(x, BLOCK: tl.constexpr, CHUNK: tl.constexpr, AT_DECAYED: tl.constexpr):
    """Add entry t of a vector up at its anchor c(t)."""
    t = tl.arange(0, BLOCK)
    return tl.sum(tl.where(anchor_of(t, CHUNK, AT_DECAYED)[None, :] == t[:, None], x[None, :], 0.0), axis=1)


@triton.jit
def invert(system, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """`(I + L)⁻¹` for strictly lower L.

    Diagonal blocks of 16 by substitution; with N the rest after that, nilpotent over blocks, (I - N)(I + N²) is exact.
    """
    N: tl.constexpr = BLOCK // 16
    b = tl.arange(0, N)
    r = tl.arange(0, 16)
    same = b[:, None, None, None] == b[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(system, [N, 16, N, 16]), 0.0), axis=2)
    x = tl.where(r[None, :, None] == r[None, None, :], 1.0, 0.0) + tl.zeros([N, 16, 16], tl.float32)
    for i in range(1, 16):
        at = r[None, :, None] == i
        row = tl.sum(tl.where(at, diagonal, 0.0), axis=1)
        x -= tl.where(at, tl.sum(row[:, :, None] * x, axis=1)[:, None, :], 0.0)
    x = tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [BLOCK, BLOCK])
    if N == 1:
        return x
    t = tl.arange(0, BLOCK)
    rest = tl.dot(x, tl.where(t[:, None] // 16 != t[None, :] // 16, system, 0.0), input_precision=PRECISION)
    if N > 2:
        x += tl.dot(tl.dot(rest, rest, input_precision=PRECISION), x, input_precision=PRECISION)
    return x - tl.dot(rest, x, input_precision=PRECISION)


@triton.jit
def solve(inverse, system, rhs, REFINE: tl.constexpr, PRECISION: tl.constexpr):
    """`(I + L)⁻¹ rhs`; one step of refinement gives what substitution would give, which the inverse alone does not."""
    x = tl.dot(inverse, rhs, input_precision=PRECISION)
    if REFINE:
        residual = rhs - x - tl.dot(system, x, input_precision=PRECISION)
        x += tl.dot(inverse, residual, input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def prepare_kernel(
    k, v, base, grad, rows, w, f, u, system_out, inverse_out, num_tokens, num_tiles, H,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, AT_DECAYED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """What the chain over tiles needs of a tile, so that U = u - w D - f S.

    w = (I + L)⁻¹ β_c K, f = (I + L)⁻¹ f_c K and u = (I + L)⁻¹ (V - K base), each `[B, H, NT, BLOCK, width]`.
    """
    tile, series, row, head = tile_of(num_tiles, H)
    index = series * num_tiles + tile
    REFINE: tl.constexpr = k.dtype.element_ty == tl.float32
    gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, K, KB):
        keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
        gram += tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    beta, pull, anchored = load_anchored(
        grad + index * BLOCK * BLOCK, rows + index * 4 * BLOCK, BLOCK, CHUNK, AT_DECAYED
    )
    system = anchored * gram
    inverse = invert(system, BLOCK, SOLVE_PRECISION).to(k.dtype.element_ty)
    if KEEP:
        store_matrix(inverse_out + index * BLOCK * BLOCK, inverse, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
        if REFINE:
            store_matrix(system_out + index * BLOCK * BLOCK, system, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    for i in range(0, K, KB):
        keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
        x = solve(inverse, system, (beta[:, None] * keys).to(keys.dtype), REFINE, PRECISION)
        store_matrix(w + index * BLOCK * K, x, 0, i, BLOCK, K, BLOCK, KB)
        if HAS_MOMENTUM:
            x = solve(inverse, system, (pull[:, None] * keys).to(keys.dtype), REFINE, PRECISION)
            store_matrix(f + index * BLOCK * K, x, 0, i, BLOCK, K, BLOCK, KB)
    for j in range(0, V, VB):
        values = load_slots(v, row, head, tile, j, num_tokens, H, V, TILE, BLOCK, VB)
        if HAS_BASE:
            error = values.to(tl.float32)
            for i in range(0, K, KB):
                keys = load_slots(k, row, head, tile, i, num_tokens, H, K, TILE, BLOCK, KB)
                start = load_matrix(base + head * K * V, i, j, K, V, KB, VB).to(keys.dtype)
                error -= tl.dot(keys, start, input_precision=PRECISION)
            values = error.to(values.dtype)
        x = solve(inverse, system, values, REFINE, PRECISION)
        store_matrix(u + index * BLOCK * V, x, 0, j, BLOCK, V, BLOCK, VB)


compile_entries = partial(compile_calls, (prepare_kernel,))
