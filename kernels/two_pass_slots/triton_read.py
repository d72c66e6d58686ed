"""Both reads of all chunks in parallel, given their memories and directions, and the gradients of the reads."""

import triton
import triton.language as tl

from ..anchored_linear.triton_tiles import load_matrix, load_slots, store_matrix, store_slots, tile_of
from ..compiled import KernelEntry, Target
from .plan import entries
from .triton_maps import map_value, map_vjp


@triton.jit
def _found(q, k, memory, u, beta, g, PRECISION: tl.constexpr):
    """β Q Kᵀ + (Q kᵀ ∘ G) U, and Q kᵀ."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    found = beta * tl.dot(q, tl.trans(memory), input_precision=PRECISION)
    return found + tl.dot((scores * g).to(u.dtype), u, input_precision=PRECISION), scores


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def read_kernel(
    q, written, states, directions, grad, rows, out, num_tokens, num_tiles, H,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = β (R V) + (R Uᵀ ∘ G) v with R = f of what the queries find in the memory of keys."""
    tile, series, row, head = tile_of(num_tiles, H)
    first = (row * 2 * H + head) * num_tiles + tile
    second = first + H * num_tiles
    t = tl.arange(0, BLOCK)
    queries = load_slots(q, row, head, tile, 0, num_tokens, H, D, TILE, BLOCK, DB)
    k = load_slots(written, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
    memory = load_matrix(states + first * M * D, 0, 0, M, D, MB, DB)
    u = load_matrix(directions + first * BLOCK * M, 0, 0, BLOCK, M, BLOCK, MB)
    g = load_matrix(grad + first * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    beta = tl.load(rows + first * 4 * BLOCK + t)[:, None]
    found, _ = _found(queries, k, memory, u, beta, g, PRECISION)
    r = map_value(found, M, MB, MAP, EPS, AXIS=1).to(k.dtype)

    v = load_slots(written, row, head + H, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
    memory = load_matrix(states + second * M * D, 0, 0, M, D, MB, DB)
    u = load_matrix(directions + second * BLOCK * M, 0, 0, BLOCK, M, BLOCK, MB)
    g = load_matrix(grad + second * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    beta = tl.load(rows + second * 4 * BLOCK + t)[:, None]
    y = beta * tl.dot(r, memory, input_precision=PRECISION)
    scores = tl.dot(r, tl.trans(u), input_precision=PRECISION)
    y += tl.dot((scores * g).to(v.dtype), v, input_precision=PRECISION)
    store_slots(out, y, row, head, tile, 0, num_tokens, H, D, TILE, BLOCK, DB)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def read_backward_kernel(
    q, written, states, directions, grad, rows, cot_out,
    cot_q, cot_written, cot_states, cot_directions, cot_grad, cot_rows, num_tokens, num_tiles, H,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of everything that the two reads of a chunk see; those of queries are complete."""
    tile, series, row, head = tile_of(num_tiles, H)
    first = (row * 2 * H + head) * num_tiles + tile
    second = first + H * num_tiles
    t = tl.arange(0, BLOCK)
    queries = load_slots(q, row, head, tile, 0, num_tokens, H, D, TILE, BLOCK, DB)
    k = load_slots(written, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
    keys = load_matrix(states + first * M * D, 0, 0, M, D, MB, DB)
    u_k = load_matrix(directions + first * BLOCK * M, 0, 0, BLOCK, M, BLOCK, MB)
    g_k = load_matrix(grad + first * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    beta_k = tl.load(rows + first * 4 * BLOCK + t)[:, None]
    found, _ = _found(queries, k, keys, u_k, beta_k, g_k, PRECISION)
    weights = map_value(found, M, MB, MAP, EPS, AXIS=1)
    r = weights.to(k.dtype)

    cot = load_slots(cot_out, row, head, tile, 0, num_tokens, H, D, TILE, BLOCK, DB)
    v = load_slots(written, row, head + H, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
    memory = load_matrix(states + second * M * D, 0, 0, M, D, MB, DB)
    u = load_matrix(directions + second * BLOCK * M, 0, 0, BLOCK, M, BLOCK, MB)
    g = load_matrix(grad + second * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    beta = tl.load(rows + second * 4 * BLOCK + t)[:, None]
    back = tl.dot(cot, tl.trans(memory), input_precision=PRECISION)
    cot_r = beta * back
    tl.store(cot_rows + second * 4 * BLOCK + t, tl.sum(weights * back, axis=1))
    read = tl.trans((beta * weights).to(k.dtype))
    store_matrix(cot_states + second * M * D, tl.dot(read, cot, input_precision=PRECISION), 0, 0, M, D, MB, DB)
    scores = tl.dot(r, tl.trans(u), input_precision=PRECISION)
    cot_weights = tl.dot(cot, tl.trans(v), input_precision=PRECISION)
    store_matrix(cot_grad + second * BLOCK * BLOCK, cot_weights * scores, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    cot_v = tl.dot(tl.trans((scores * g).to(k.dtype)), cot, input_precision=PRECISION)
    store_slots(cot_written, cot_v, row, head + H, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
    mixed = (cot_weights * g).to(k.dtype)
    cot_r += tl.dot(mixed, u, input_precision=PRECISION)
    cot_u = tl.dot(tl.trans(mixed), r, input_precision=PRECISION)
    store_matrix(cot_directions + second * BLOCK * M, cot_u, 0, 0, BLOCK, M, BLOCK, MB)

    # Loaded again: kept over all of the above they would not fit into registers.
    queries = load_slots(q, row, head, tile, 0, num_tokens, H, D, TILE, BLOCK, DB)
    k = load_slots(written, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
    keys = load_matrix(states + first * M * D, 0, 0, M, D, MB, DB)
    u_k = load_matrix(directions + first * BLOCK * M, 0, 0, BLOCK, M, BLOCK, MB)
    g_k = load_matrix(grad + first * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    beta_k = tl.load(rows + first * 4 * BLOCK + t)[:, None]
    cot_found = map_vjp(found, cot_r, M, MB, MAP, EPS, AXIS=1)
    cot = cot_found.to(k.dtype)
    back = tl.dot(cot, keys, input_precision=PRECISION)
    tl.store(cot_rows + first * 4 * BLOCK + t, tl.sum(queries.to(tl.float32) * back, axis=1))
    read = tl.trans((beta_k * cot_found).to(k.dtype))
    store_matrix(cot_states + first * M * D, tl.dot(read, queries, input_precision=PRECISION), 0, 0, M, D, MB, DB)
    cot_weights = tl.dot(cot, tl.trans(u_k), input_precision=PRECISION)
    asked = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
    store_matrix(cot_grad + first * BLOCK * BLOCK, cot_weights * asked, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    mixed = (cot_weights * g_k).to(k.dtype)
    cot_queries = beta_k * back + tl.dot(mixed, k, input_precision=PRECISION)
    store_slots(cot_q, cot_queries, row, head, tile, 0, num_tokens, H, D, TILE, BLOCK, DB)
    cot_k = tl.dot(tl.trans(mixed), queries, input_precision=PRECISION)
    store_slots(cot_written, cot_k, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
    cot_u = tl.dot(tl.trans((asked * g_k).to(k.dtype)), cot, input_precision=PRECISION)
    store_matrix(cot_directions + first * BLOCK * M, cot_u, 0, 0, BLOCK, M, BLOCK, MB)


def compile_entries(target: Target) -> list[KernelEntry]:
    """The default sizes in both precisions, and the map whose derivative is a number."""
    kernels = (read_kernel, read_backward_kernel)
    return [*entries(kernels, chain=False), *entries(kernels[1:], chain=False, name="identity")]
