"""The chain over chunks, forwards and backwards: what cannot run in parallel.

A program owns one memory of one head, `[M, D]` in float32 registers. What a chunk adds to it has slots as rows and
tokens as columns: 16 tokens as rows would leave most of a matrix instruction, or of the warps, without work. Copies
that the parallel kernels read are in the dtype of what is written.
"""

import triton
import triton.language as tl

from ..anchored_linear.triton_tiles import load_matrix, load_slots, store_matrix, store_slots
from ..compiled import KernelEntry, Target
from .plan import entries
from .triton_maps import code, code_vjp


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def chain_kernel(
    written, targets, rows, ends, start, states, directions, last, num_tokens, num_tiles, H,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Directions of every chunk, and the memories in front of it. There are 2 H memories, and targets for H."""
    series = tl.program_id(0).to(tl.int64)
    row, head = series // (2 * H), series % (2 * H)
    t = tl.arange(0, BLOCK)
    memory = load_matrix(start + series * M * D, 0, 0, M, D, MB, DB)
    for tile in range(num_tiles):
        index = series * num_tiles + tile
        w = load_slots(written, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
        target = load_slots(targets, row, head % H, tile, 0, num_tokens, H, M, TILE, BLOCK, MB)
        target = tl.trans(target).to(tl.float32)
        anchor = memory.to(w.dtype)
        store_matrix(states + index * M * D, anchor, 0, 0, M, D, MB, DB)
        z = tl.dot(anchor, tl.trans(w), input_precision=PRECISION)
        u = -code(z, target, M, MB, MAP, EPS, AXIS=0)
        store_matrix(directions + index * BLOCK * M, tl.trans(u), 0, 0, BLOCK, M, BLOCK, MB)
        write = tl.load(rows + index * 4 * BLOCK + 2 * BLOCK + t)[None, :]
        pushed = (write * u).to(w.dtype)
        memory = tl.load(ends + index * 4) * memory + tl.dot(pushed, w, input_precision=PRECISION)
    store_matrix(last + series * M * D, memory, 0, 0, M, D, MB, DB)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def chain_backward_kernel(
    written, targets, rows, ends, states, directions, cot_directions, cot_states, cot_last,
    cot_written, cot_targets, cot_rows, cot_ends, cot_start, num_tokens, num_tiles, H, hypergrad,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what is written, targets, coefficients and start.

    `cot_directions`, `cot_states` and `cot_written` hold what the reads of the same chunk have brought; the last one
    is completed in place.
    """
    series = tl.program_id(0).to(tl.int64)
    row, head = series // (2 * H), series % (2 * H)
    t = tl.arange(0, BLOCK)
    cot_memory = load_matrix(cot_last + series * M * D, 0, 0, M, D, MB, DB)
    for step in tl.range(num_tiles, disable_licm=True):
        tile = num_tiles - 1 - step
        index = series * num_tiles + tile
        w = load_slots(written, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
        target = load_slots(targets, row, head % H, tile, 0, num_tokens, H, M, TILE, BLOCK, MB)
        target = tl.trans(target).to(tl.float32)
        anchor = load_matrix(states + index * M * D, 0, 0, M, D, MB, DB)
        u = tl.trans(load_matrix(directions + index * BLOCK * M, 0, 0, BLOCK, M, BLOCK, MB))
        write = tl.load(rows + index * 4 * BLOCK + 2 * BLOCK + t)[None, :]
        behind = cot_memory.to(w.dtype)
        pulled = tl.dot(behind, tl.trans(w), input_precision=PRECISION)
        tl.store(cot_rows + index * 4 * BLOCK + 2 * BLOCK + t, tl.sum(u.to(tl.float32) * pulled, axis=0))
        tl.store(cot_ends + index * 4, tl.sum(anchor.to(tl.float32) * cot_memory))
        cot_u = tl.trans(load_matrix(cot_directions + index * BLOCK * M, 0, 0, BLOCK, M, BLOCK, MB)) + write * pulled
        cot_w = write * tl.dot(tl.trans(behind), u, input_precision=PRECISION)
        z = tl.dot(anchor, tl.trans(w), input_precision=PRECISION)
        cot_z, cot_target = code_vjp(z, target, -cot_u, M, MB, MAP, EPS, AXIS=0)
        store_slots(cot_targets, tl.trans(cot_target), row, head, tile, 0, num_tokens, 2 * H, M, TILE, BLOCK, MB)
        cot_z = (hypergrad * cot_z).to(w.dtype)
        cot_w = tl.trans(cot_w + tl.dot(tl.trans(anchor), cot_z, input_precision=PRECISION))
        cot_w += load_slots(cot_written, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB).to(tl.float32)
        store_slots(cot_written, cot_w, row, head, tile, 0, num_tokens, 2 * H, D, TILE, BLOCK, DB)
        cot_memory = tl.load(ends + index * 4) * cot_memory + tl.dot(cot_z, w, input_precision=PRECISION)
        cot_memory += load_matrix(cot_states + index * M * D, 0, 0, M, D, MB, DB)
    store_matrix(cot_start + series * M * D, cot_memory, 0, 0, M, D, MB, DB)


def compile_entries(target: Target) -> list[KernelEntry]:
    """The default sizes in both precisions, and the widest memory."""
    return entries((chain_kernel, chain_backward_kernel), chain=True)
