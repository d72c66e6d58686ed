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

from .launch import differentiable_op, dot_precision, launch
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
def _segments(log_gate, t, s):
    """exp(g_{s+1} + ... + g_t), zero above the diagonal: summed segment by segment, as differences lose digits."""
    steps = tl.where(t[:, None] > s[None, :], log_gate[:, None], 0.0)
    return tl.where(t[:, None] >= s[None, :], tl.exp(tl.cumsum(steps, axis=0)), 0.0)


@triton.jit
def _gates(step, log_decay, log_momentum, at, inside, HAS_DECAY: tl.constexpr, HAS_MOMENTUM: tl.constexpr):
    theta = tl.load(step + at, mask=inside, other=0.0)
    decay = tl.zeros_like(theta)
    momentum = tl.zeros_like(theta)
    if HAS_DECAY:
        decay = tl.load(log_decay + at, mask=inside, other=0.0)
    if HAS_MOMENTUM:
        momentum = tl.load(log_momentum + at, mask=inside, other=0.0)
    return theta, decay, momentum


@triton.jit
def _place(anchored, num_tokens, num_tiles, H, G: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Which gates a program reads, which of them are there, and the last row that enters the state."""
    program = tl.program_id(0)
    tile, series = program % num_tiles, program // num_tiles
    row, head, gate_set = series // (H * G), (series // G) % H, series % G
    t = tl.arange(0, BLOCK)
    slot = tile * TILE + t
    inside = (t < TILE) & (slot < num_tokens)
    at = ((row.to(tl.int64) * num_tokens + slot) * H + head) * G + gate_set
    end = tl.load(anchored + row) - tile * TILE
    last = tl.minimum(end, TILE) - 1
    return program.to(tl.int64), t, inside, at, last


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def coefficients_kernel(
    step, log_decay, log_momentum, anchored, grad, rows, ends, num_tokens, num_tiles, H,
    G: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, t, inside, at, last = _place(anchored, num_tokens, num_tiles, H, G, TILE, BLOCK)
    theta, decay, momentum = _gates(step, log_decay, log_momentum, at, inside, HAS_DECAY, HAS_MOMENTUM)
    keeps = _segments(decay, t, t)
    beta = tl.exp(tl.cumsum(decay, axis=0))
    leaves = (t == last)[:, None]
    if HAS_MOMENTUM:
        carries = _segments(momentum, t, t)
        m = tl.exp(tl.cumsum(momentum, axis=0))
        weights = carries * theta[None, :]
        g = tl.dot(keeps, weights, input_precision=PRECISION)
        f = tl.sum(keeps * m[None, :], axis=1)
        write_momentum = tl.sum(tl.where(leaves, weights, 0.0), axis=0)
    else:
        g = keeps * theta[None, :]
        f = tl.zeros_like(beta)
        m = f
        write_momentum = f
    s = t[None, :]
    tl.store(grad + program * BLOCK * BLOCK + t[:, None] * BLOCK + s, g)
    row = rows + program * 4 * BLOCK + t
    tl.store(row, beta)
    tl.store(row + BLOCK, f)
    tl.store(row + 2 * BLOCK, tl.sum(tl.where(leaves, g, 0.0), axis=0))
    tl.store(row + 3 * BLOCK, write_momentum)
    unchanged = tl.where(last < 0, 1.0, 0.0)
    tl.store(ends + program * 4, unchanged + tl.sum(tl.where(t == last, beta, 0.0)))
    tl.store(ends + program * 4 + 1, tl.sum(tl.where(t == last, f, 0.0)))
    tl.store(ends + program * 4 + 2, unchanged + tl.sum(tl.where(t == last, m, 0.0)))
    tl.store(ends + program * 4 + 3, 0.0)


@triton.jit
def _log_gate_gradient(cot_segments, cot_product, t):
    """Gradient of log gates from those of (logs of) their segments [t, s] and of their running products."""
    below = tl.cumsum(cot_segments, axis=0, reverse=True)
    return tl.sum(tl.where(t[None, :] < t[:, None], below, 0.0), axis=1) + tl.cumsum(cot_product, 0, reverse=True)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def coefficients_backward_kernel(
    cot_grad, cot_rows, cot_ends, step, log_decay, log_momentum, anchored, cot_step, cot_log_decay, cot_log_momentum,
    num_tokens, num_tiles, H,
    G: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, t, inside, at, last = _place(anchored, num_tokens, num_tiles, H, G, TILE, BLOCK)
    theta, decay, momentum = _gates(step, log_decay, log_momentum, at, inside, HAS_DECAY, HAS_MOMENTUM)
    keeps = _segments(decay, t, t)
    leaves = (t == last)[:, None]
    row = cot_rows + program * 4 * BLOCK + t
    end = cot_ends + program * 4
    cot_g = tl.load(cot_grad + program * BLOCK * BLOCK + t[:, None] * BLOCK + t[None, :])
    cot_g += tl.where(leaves, tl.load(row + 2 * BLOCK)[None, :], 0.0)
    cot_g = tl.where(t[:, None] >= t[None, :], cot_g, 0.0)
    cot_beta = tl.load(row) + tl.where(t == last, tl.load(end), 0.0)
    if HAS_MOMENTUM:
        carries = _segments(momentum, t, t)
        m = tl.exp(tl.cumsum(momentum, axis=0))
        cot_f = tl.load(row + BLOCK) + tl.where(t == last, tl.load(end + 1), 0.0)
        cot_weights = tl.dot(tl.trans(keeps), cot_g, input_precision=PRECISION)
        cot_weights += tl.where(leaves, tl.load(row + 3 * BLOCK)[None, :], 0.0)
        cot_weights = tl.where(t[:, None] >= t[None, :], cot_weights, 0.0)
        cot_theta = tl.sum(cot_weights * carries, axis=0)
        cot_m = tl.sum(keeps * cot_f[:, None], axis=0) + tl.where(t == last, tl.load(end + 2), 0.0)
        cot_momentum = _log_gate_gradient(cot_weights * carries * theta[None, :], cot_m * m, t)
        tl.store(cot_log_momentum + at, cot_momentum, mask=inside)
        cot_keeps = tl.dot(cot_g, tl.trans(carries * theta[None, :]), input_precision=PRECISION)
        cot_keeps += cot_f[:, None] * m[None, :]
    else:
        cot_theta = tl.sum(cot_g * keeps, axis=0)
        cot_keeps = cot_g * theta[None, :]
    tl.store(cot_step + at, cot_theta, mask=inside)
    if HAS_DECAY:
        beta = tl.exp(tl.cumsum(decay, axis=0))
        tl.store(cot_log_decay + at, _log_gate_gradient(cot_keeps * keeps, cot_beta * beta, t), mask=inside)


def _layout(step: Tensor, tile: int) -> tuple[int, tuple[int, ...], dict[str, int]]:
    batch, num_tokens, heads, sets = step.shape
    num_tiles = triton.cdiv(num_tokens, tile)
    block = block_of(tile)
    constants = {"G": sets, "TILE": tile, "BLOCK": block, "num_warps": 4 if block >= 64 else 2, "num_stages": 1}
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
        HAS_DECAY=log_decay is not None, HAS_MOMENTUM=log_momentum is not None, PRECISION=dot_precision(), **constants,
    )  # fmt: skip
    return outputs


def _backward(
    cot_grad: Tensor, cot_rows: Tensor, cot_ends: Tensor,
    step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None, anchored: Tensor, tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    programs, shape, constants = _layout(step, tile)
    gradients = [step.new_empty(0) if gate is None else torch.empty_like(gate) for gate in (step, log_decay, log_momentum)]
    cotangents = [x.contiguous() for x in (cot_grad, cot_rows, cot_ends)]
    launch(
        coefficients_backward_kernel, programs, *cotangents, step, log_decay, log_momentum, anchored, *gradients,
        step.shape[1], shape[-1], step.shape[2],
        HAS_DECAY=log_decay is not None, HAS_MOMENTUM=log_momentum is not None, PRECISION=dot_precision(), **constants,
    )  # fmt: skip
    return tuple(gradients)


def _save(inputs: tuple, outputs: tuple) -> tuple[list[Tensor | None], list]:
    return list(inputs[:4]), [inputs[4]]


def _spread(gradients: tuple[Tensor, ...], numbers: list) -> tuple[Tensor | None, ...]:
    return (*(x if x.numel() else None for x in gradients), None, None)


_coefficients = differentiable_op("tile_coefficients", _forward, _backward, _save, _spread)
