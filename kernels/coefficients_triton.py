"""Gates to coefficients (`kernels/coefficients.py`) as kernels, one program per tile and gate set.

Layout, for gates `[B, S, H, G]` and NT tiles of `tile` slots, `n` the tile rounded up to a power of two:

    grad [B, H, G, NT, n, n]     G[t, s]
    rows [B, H, G, NT, 4, n]     β_t, f_t, and the rows of G and N that leave the tile
    ends [B, H, G, NT, 4]        β, f, m of the last token that enters the outgoing state (the fourth is unused)

Slots behind the last token have step 0, decay 1 and momentum 1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiled import KernelEntry, Target
from .launch import differentiable_op, launch
from .types import Gates


class TileCoefficients(NamedTuple):
    """Coefficients of all tiles, float32; shapes in the module docstring."""

    grad: Tensor
    rows: Tensor
    ends: Tensor


def block_of(tile: int) -> int:
    """Width of the matrices of a tile: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(tile))


def tile_coefficients(gates: Gates, anchored: Tensor, tile: int) -> TileCoefficients:
    """Coefficients of all tiles, differentiable for the gates.

    Args:
        gates: `[B, S, H, G]` float32.
        anchored: `[B]` int64, how many leading slots of each row enter the state that is carried out; tokens behind
            them are read only.
        tile: slots of a tile, at most 64.
    """
    step, log_decay, log_momentum = (None if gate is None else gate.contiguous() for gate in gates)
    return TileCoefficients(*_coefficients(step, log_decay, log_momentum, anchored, tile))


@triton.jit
def _place(anchored, num_tokens, num_tiles, H, G: tl.constexpr, TILE: tl.constexpr):
    """Index of a program, its first gate, the distance to the next one, the tokens there, and the last that counts."""
    program = tl.program_id(0)
    tile, series = program % num_tiles, program // num_tiles
    row, head, gate_set = series // (H * G), (series // G) % H, series % G
    start = tile * TILE
    first = ((row.to(tl.int64) * num_tokens + start) * H + head) * G + gate_set
    end = tl.load(anchored + row) - start
    return program.to(tl.int64), first, H * G, tl.minimum(num_tokens - start, TILE), tl.minimum(end, TILE) - 1


@triton.jit
def _gate(log_gate, at, inside, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.exp(tl.load(log_gate + at, mask=inside, other=0.0))
    return 1.0


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def coefficients_kernel(
    step, log_decay, log_momentum, anchored, grad, rows, ends, num_tokens, num_tiles, H,
    G: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Rows of G and N from the ones above: N_t = η_t N_{t-1} + θ_t e_t, G_t = a_t G_{t-1} + N_t."""
    program, first, stride, length, last = _place(anchored, num_tokens, num_tiles, H, G, TILE)
    s = tl.arange(0, BLOCK)
    g = tl.zeros([BLOCK], tl.float32)
    weights, write, write_momentum = g, g, g
    beta, f, m = 1.0, 0.0, 1.0
    keep, pull, carry = 1.0, 0.0, 1.0
    grad += program * BLOCK * BLOCK + s
    rows += program * 4 * BLOCK
    for t in range(BLOCK):
        inside = length > t
        at = first + t * stride
        theta = tl.load(step + at, mask=inside, other=0.0)
        decay = _gate(log_decay, at, inside, HAS_DECAY)
        added = tl.where(s == t, theta, 0.0)
        beta *= decay
        if HAS_MOMENTUM:
            momentum = _gate(log_momentum, at, inside, HAS_MOMENTUM)
            weights = momentum * weights + added
            g = decay * g + weights
            m *= momentum
            f = decay * f + m
        else:
            g = decay * g + added
        tl.store(grad + t * BLOCK, g)
        tl.store(rows + t, beta)
        tl.store(rows + BLOCK + t, f)
        leaves = last == t
        write, write_momentum = tl.where(leaves, g, write), tl.where(leaves, weights, write_momentum)
        keep, pull, carry = tl.where(leaves, beta, keep), tl.where(leaves, f, pull), tl.where(leaves, m, carry)
    tl.store(rows + 2 * BLOCK + s, write)
    tl.store(rows + 3 * BLOCK + s, write_momentum)
    ends += program * 4
    tl.store(ends, keep)
    tl.store(ends + 1, pull)
    tl.store(ends + 2, carry)
    tl.store(ends + 3, 0.0)


@triton.jit
def _momentum_rows(scratch, step, log_momentum, first, stride, length, s, BLOCK: tl.constexpr):
    """Store N and, behind it, m_t; every thread reads back what it has written itself."""
    weights = tl.zeros([BLOCK], tl.float32)
    m = 1.0
    for t in range(BLOCK):
        at = first + t * stride
        momentum = _gate(log_momentum, at, t < length, True)
        weights = momentum * weights + tl.where(s == t, tl.load(step + at, mask=t < length, other=0.0), 0.0)
        m *= momentum
        tl.store(scratch + t * BLOCK + s, weights)
        tl.store(scratch + BLOCK * BLOCK + t * BLOCK + s, m + tl.zeros_like(weights))


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def coefficients_backward_kernel(
    cot_grad, cot_rows, cot_ends, grad, rows, step, log_decay, log_momentum, anchored, scratch,
    cot_step, cot_log_decay, cot_log_momentum, num_tokens, num_tiles, H,
    G: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """The recurrence backwards: cotangents of G_t and N_t gather those of the rows below."""
    program, first, stride, length, last = _place(anchored, num_tokens, num_tiles, H, G, TILE)
    s = tl.arange(0, BLOCK)
    cot_g = tl.zeros([BLOCK], tl.float32)
    cot_weights = cot_g
    cot_beta, cot_f, cot_m = 0.0, 0.0, 0.0
    grad += program * BLOCK * BLOCK + s
    cot_grad += program * BLOCK * BLOCK + s
    rows += program * 4 * BLOCK
    cot_rows += program * 4 * BLOCK
    cot_ends += program * 4
    if HAS_MOMENTUM:
        scratch += program * 2 * BLOCK * BLOCK
        _momentum_rows(scratch, step, log_momentum, first, stride, length, s, BLOCK)
        scratch += s
    for i in range(BLOCK):
        t = BLOCK - 1 - i
        inside = length > t
        leaves = last == t
        leaving = tl.where(leaves, t, -1)
        at = first + t * stride
        decay = _gate(log_decay, at, inside, HAS_DECAY)
        cot_g += tl.where(s <= t, tl.load(cot_grad + t * BLOCK), 0.0)
        cot_g += tl.load(cot_rows + 2 * BLOCK + s, mask=s <= leaving, other=0.0)
        cot_beta += tl.load(cot_rows + t) + tl.load(cot_ends, mask=leaves, other=0.0)
        cot_decay = cot_beta * tl.load(rows + t - 1, mask=t > 0, other=1.0)
        cot_decay += tl.sum(cot_g * tl.load(grad + (t - 1) * BLOCK, mask=s < t, other=0.0))
        if HAS_MOMENTUM:
            momentum = _gate(log_momentum, at, inside, HAS_MOMENTUM)
            cot_weights += cot_g + tl.load(cot_rows + 3 * BLOCK + s, mask=s <= leaving, other=0.0)
            cot_f += tl.load(cot_rows + BLOCK + t) + tl.load(cot_ends + 1, mask=leaves, other=0.0)
            cot_m += cot_f + tl.load(cot_ends + 2, mask=leaves, other=0.0)
            cot_decay += cot_f * tl.load(rows + BLOCK + t - 1, mask=t > 0, other=0.0)
            # m_{t-1} fills its row.
            before = scratch + (t - 1) * BLOCK
            cot_momentum = tl.sum(cot_weights * tl.load(before, mask=s < t, other=0.0))
            m = tl.max(tl.load(before + BLOCK * BLOCK, mask=s < t, other=0.0))
            cot_momentum += cot_m * tl.where(t > 0, m, 1.0)
            tl.store(cot_step + at, tl.sum(tl.where(s == t, cot_weights, 0.0)), mask=inside)
            tl.store(cot_log_momentum + at, cot_momentum * momentum, mask=inside)
            cot_weights *= momentum
            cot_m *= momentum
            cot_f *= decay
        else:
            tl.store(cot_step + at, tl.sum(tl.where(s == t, cot_g, 0.0)), mask=inside)
        if HAS_DECAY:
            tl.store(cot_log_decay + at, cot_decay * decay, mask=inside)
        cot_g *= decay
        cot_beta *= decay


def _layout(step: Tensor, tile: int) -> tuple[int, tuple[int, ...], dict[str, int]]:
    batch, num_tokens, heads, sets = step.shape
    num_tiles = triton.cdiv(num_tokens, tile)
    # One warp: the work of a program is a chain, and there are enough programs to hide it.
    constants = {"G": sets, "TILE": tile, "BLOCK": block_of(tile), "num_warps": 1, "num_stages": 1}
    return batch * heads * sets * num_tiles, (batch, heads, sets, num_tiles), constants


def _forward(
    step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None, anchored: Tensor, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    programs, shape, constants = _layout(step, tile)
    block = constants["BLOCK"]
    outputs = step.new_empty(*shape, block, block), step.new_empty(*shape, 4, block), step.new_empty(*shape, 4)
    launch(
        coefficients_kernel, programs, step, log_decay, log_momentum, anchored, *outputs,
        step.shape[1], shape[-1], step.shape[2],
        HAS_DECAY=log_decay is not None, HAS_MOMENTUM=log_momentum is not None, **constants,
    )  # fmt: skip
    return outputs


def _backward(
    cot_grad: Tensor, cot_rows: Tensor, cot_ends: Tensor, grad: Tensor, rows: Tensor,
    step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None, anchored: Tensor, tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    programs, shape, constants = _layout(step, tile)
    gates = step, log_decay, log_momentum
    gradients = [step.new_empty(0) if gate is None else torch.empty_like(gate) for gate in gates]
    scratch = None if log_momentum is None else step.new_empty(programs, 2, constants["BLOCK"], constants["BLOCK"])
    launch(
        coefficients_backward_kernel, programs,
        *(x.contiguous() for x in (cot_grad, cot_rows, cot_ends)), grad, rows, *gates, anchored, scratch, *gradients,
        step.shape[1], shape[-1], step.shape[2],
        HAS_DECAY=log_decay is not None, HAS_MOMENTUM=log_momentum is not None, **constants,
    )  # fmt: skip
    return tuple(gradients)


def _save(inputs: tuple, outputs: tuple) -> tuple[list[Tensor | None], list]:
    return [*outputs[:2], *inputs[:4]], [inputs[4]]


def _spread(gradients: tuple[Tensor, ...], numbers: list) -> tuple[Tensor | None, ...]:
    return (*(x if x.numel() else None for x in gradients), None, None)


_coefficients = differentiable_op("tile_coefficients", _forward, _backward, _save, _spread)


def compile_entries(target: Target) -> list[KernelEntry]:
    """Tiles of the two usual widths, with decay and momentum."""
    numbers = {"anchored": "*i64", "num_tokens": "i32", "num_tiles": "i32", "H": "i32:16"}
    found = []
    for tile in (64, 16):
        constants = {"G": 1, "TILE": tile, "BLOCK": block_of(tile), "HAS_DECAY": True, "HAS_MOMENTUM": True}
        for kernel in (coefficients_kernel, coefficients_backward_kernel):
            types = {name: numbers.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
            name = f"{kernel.__name__} tile {tile}"
            found.append(KernelEntry(name, kernel, types, constants, num_warps=1, num_stages=1, has_product=False))
    return found
