"""One token of a matrix memory in one launch: `anchored_mlp/decode.py` for depth 1, in place.

A program has a block of columns of one head's memory; with a LayerNorm it has all of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..anchored_mlp.triton_math import descent, output
from ..compiled import KernelEntry, Target
from ..decode_launch import entry_types, in_place_op, whole_heads
from ..decode_rows import (
    append_gates,
    buffer_tile,
    fill_zero,
    finish,
    fold_matrix,
    newest_coefficients,
    phase_of,
    sum_rows,
)
from ..launch import dot_precision, launch, multiprocessors


class Plan(NamedTuple):
    """How a launch is cut: block sizes (those of `fold` in both directions), number of programs and warps."""

    block_k: int
    block_v: int
    block_rows: int
    fold: tuple[int, int]
    programs: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes."""
        blocks = {"BLOCK_K": self.block_k, "BLOCK_V": self.block_v, "BLOCK_ROWS": self.block_rows}
        return blocks | {"FOLD_K": self.fold[0], "FOLD_V": self.fold[1]}


def plan(batch: int, heads: int, key_width: int, value_width: int, chunk: int, norm: bool, processors: int) -> Plan:
    """Cut a launch: columns are split until every multiprocessor has two programs, down to 16 columns."""
    padded = max(16, triton.next_power_of_2(value_width))
    block_v = padded if norm else min(padded, 64)
    while not norm and block_v > 16 and batch * heads * triton.cdiv(value_width, block_v) < 2 * processors:
        block_v //= 2
    num_warps = 8 if block_v >= 128 else 4
    # A tile of the memory takes 16 registers of a thread, and one of the momentum as many.
    block_k = min(max(16, triton.next_power_of_2(key_width)), 512 * num_warps // block_v)
    programs = batch * heads * triton.cdiv(value_width, block_v)
    # Tiles that keep the registers of all targets from spilling, found with the compile check.
    fold = (16, min(block_v, 64)) if num_warps == 4 else (32, 32)
    return Plan(block_k, block_v, max(16, triton.next_power_of_2(chunk)), fold, programs, num_warps)


@triton.jit
def products(
    q, k, base, memory, momentum, keys, series, head, columns, p,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """k base, k D, q base, q D, q S, and q times every buffered key (row p: the new one)."""
    key_base, key_memory, query_base = (tl.zeros([BLOCK_V], tl.float32),) * 3
    query_memory, query_momentum = (tl.zeros([BLOCK_V], tl.float32),) * 2
    scores = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        at = (series * K + i)[:, None] * V + columns[None, :]
        inside = (i < K)[:, None] & (columns < V)[None, :]
        query = tl.load(q + i, mask=i < K, other=0.0).to(tl.float32)
        key = tl.load(k + i, mask=i < K, other=0.0).to(tl.float32)
        d = tl.load(memory + at, mask=inside, other=0.0)
        key_memory += tl.sum(key[:, None] * d, axis=0)
        query_memory += tl.sum(query[:, None] * d, axis=0)
        if momentum is not None:
            query_momentum += tl.sum(query[:, None] * tl.load(momentum + at, mask=inside, other=0.0), axis=0)
        if base is not None:
            w = tl.load(base + (head * K + i)[:, None] * V + columns[None, :], mask=inside, other=0.0)
            key_base += tl.sum(key[:, None] * w, axis=0)
            query_base += tl.sum(query[:, None] * w, axis=0)
        rows = buffer_tile(keys, series, tl.arange(0, BLOCK_ROWS), i, p, key, CHUNK, K)
        scores += tl.sum(rows * query[None, :], axis=1)
    return key_base, key_memory, query_base, query_memory, query_momentum, scores


@triton.jit
def fold_online(
    k, u, memory, momentum, series, columns, beta, f, m, theta,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Move the anchor behind the token, where every token does."""
    for start in range(0, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        at = (series * K + i)[:, None] * V + columns[None, :]
        inside = (i < K)[:, None] & (columns < V)[None, :]
        key = tl.load(k + i, mask=i < K, other=0.0).to(tl.float32)
        step = (theta * key)[:, None] * u[None, :]
        after = beta * tl.load(memory + at, mask=inside, other=0.0) + step
        if momentum is not None:
            pace = tl.load(momentum + at, mask=inside, other=0.0)
            after += f * pace
            tl.store(momentum + at, m * pace + step, mask=inside)
        tl.store(memory + at, after, mask=inside)


@triton.jit
def append(
    k, v, u, keys, values, directions, series, columns, p,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write row p. Every column block writes the key, which is the same in all, since a fold reads it from there."""
    at = series * CHUNK + p
    for start in range(0, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        tl.store(keys + at * K + i, tl.load(k + i, mask=i < K, other=0.0).to(tl.float32), mask=i < K)
    value = tl.load(v + columns, mask=columns < V, other=0.0)
    tl.store(values + at * V + columns, value.to(tl.float32), mask=columns < V)
    tl.store(directions + at * V + columns, u, mask=columns < V)


@triton.jit
def fold_columns(
    memory, momentum, keys, directions, series, block, beta, f, m, grad, grad_momentum,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, FOLD_K: tl.constexpr, FOLD_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Move the anchor of a block of columns behind its full buffers."""
    for start in range(0, BLOCK_V, FOLD_V):
        columns = block * BLOCK_V + start + tl.arange(0, FOLD_V)
        fold_matrix(
            memory, momentum, keys, directions, series, tl.arange(0, BLOCK_ROWS), columns,
            beta, f, m, grad, grad_momentum, K, V, CHUNK, FOLD_K, PRECISION,
        )  # fmt: skip


@triton.jit
def empty_columns(values, directions, series, columns, V: tl.constexpr, CHUNK: tl.constexpr):
    """Zero a block of columns of all rows."""
    for s in range(CHUNK):
        at = (series * CHUNK + s) * V + columns
        tl.store(directions + at, tl.zeros_like(columns).to(tl.float32), mask=columns < V)
        tl.store(values + at, tl.zeros_like(columns).to(tl.float32), mask=columns < V)


@triton.jit
def read_and_write(
    q, k, v, base, weight, bias, decay, columns, beta, f, grad, p,
    memory, momentum, keys, directions, series, head, eps,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Output of the token and its descent direction."""
    key_base, key_memory, query_base, query_memory, query_momentum, scores = products(
        q, k, base, memory, momentum, keys, series, head, columns, p, K, V, CHUNK, BLOCK_K, BLOCK_V, BLOCK_ROWS
    )  # fmt: skip
    if DECAY_FIRST:
        key_memory *= tl.exp(tl.load(decay))
    z, inside = (key_base + key_memory)[None, :], (columns < V)[None, :]
    value = tl.load(v + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    has_norm: tl.constexpr = weight is not None
    gamma, shift, key, query = key_base, key_base, value, value
    if has_norm:
        gamma = tl.load(weight + head * V + columns, mask=columns < V, other=0.0)
        shift = tl.load(bias + head * V + columns, mask=columns < V, other=0.0)
        key = tl.load(k + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        query = tl.load(q + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    u = tl.sum(descent(z, key, value, gamma, shift, inside, eps, V, has_norm), axis=0)
    r = query_base + beta * query_memory + f * query_momentum
    r += sum_rows(directions, grad * scores, tl.arange(0, BLOCK_ROWS), series, columns, p, u, CHUNK, V)
    return output(query, r[None, :], gamma, shift, inside, eps, V, has_norm), u


@triton.jit
def linear_decode_kernel(
    q, k, v, step, log_decay, log_momentum, base, weight, bias, mask, out,
    memory, momentum, keys, values, step_rows, decay_rows, momentum_rows, directions, phase,
    q_stride, k_stride, v_stride, H, eps,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, DECAY_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    FOLD_K: tl.constexpr, FOLD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    block, series = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row, head = series // H, series % H
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    out += series * V + columns
    if mask is not None:
        if not tl.load(mask + row):
            tl.store(out, tl.zeros([BLOCK_V], tl.float32), mask=columns < V)
            return
    p = phase_of(phase, row)
    q += row * q_stride + head * K
    k += row * k_stride + head * K
    v += row * v_stride + head * V
    beta, f, m, grad, grad_momentum = newest_coefficients(
        step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, 0, p, 1, CHUNK, BLOCK_ROWS
    )
    answer, u = read_and_write(
        q, k, v, base, weight, bias, log_decay + series if DECAY_FIRST else None, columns, beta, f, grad, p,
        memory, momentum, keys, directions, series, head, eps,
        K, V, CHUNK, DECAY_FIRST, BLOCK_K, BLOCK_V, BLOCK_ROWS,
    )  # fmt: skip
    tl.store(out[None, :], answer, mask=(columns < V)[None, :])
    if CHUNK == 1:
        fold_online(k, u, memory, momentum, series, columns, beta, f, m, tl.sum(grad, axis=0), K, V, BLOCK_K)
    else:
        append(k, v, u, keys, values, directions, series, columns, p, K, V, CHUNK, BLOCK_K)
        is_full = p == CHUNK - 1
        if is_full:
            tl.debug_barrier()  # row p is written
            fold_columns(
                memory, momentum, keys, directions, series, block, beta, f, m, grad, grad_momentum,
                K, V, CHUNK, BLOCK_V, BLOCK_ROWS, FOLD_K, FOLD_V, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()  # every warp has read the rows
            empty_columns(values, directions, series, columns, V, CHUNK)
        elif block == 0:
            append_gates(step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, 0, p, 1, CHUNK)
        is_last = finish(phase, row, p, H * blocks, CHUNK)
        if is_last & is_full:
            fill_zero(keys, row * H * CHUNK * K, H * CHUNK * K, 1024)
            fill_zero(step_rows, row * H * CHUNK, H * CHUNK, 1024)
            if log_decay is not None:
                fill_zero(decay_rows, row * H * CHUNK, H * CHUNK, 1024)
            if log_momentum is not None:
                fill_zero(momentum_rows, row * H * CHUNK, H * CHUNK, 1024)


def _step(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    base: Tensor | None, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    memory: Tensor, momentum: Tensor | None, keys: Tensor, values: Tensor, step_rows: Tensor,
    decay_rows: Tensor | None, momentum_rows: Tensor | None, directions: Tensor, phase: Tensor,
    decay_first: bool, eps: float,
) -> Tensor:  # fmt: skip
    (batch, _, heads, key_width), value_width, chunk = q.shape, v.shape[-1], keys.shape[2]
    out = torch.empty(batch, 1, heads, value_width, dtype=v.dtype, device=v.device)
    q, k, v = (whole_heads(x) for x in (q, k, v))
    cut = plan(batch, heads, key_width, value_width, chunk, weight is not None, multiprocessors(q.device))
    launch(
        linear_decode_kernel, cut.programs, q, k, v, step, log_decay, log_momentum, base, weight, bias, mask, out,
        memory, momentum, keys, values, step_rows, decay_rows, momentum_rows, directions, phase,
        q.stride(0), k.stride(0), v.stride(0), heads, eps,
        K=key_width, V=value_width, CHUNK=chunk, DECAY_FIRST=decay_first and log_decay is not None,
        **cut.constants, PRECISION=dot_precision(memory.dtype),
        num_warps=cut.num_warps, num_stages=1,
    )  # fmt: skip
    return out


decode = in_place_op("linear_decode", _step, operands=10)


def compile_entries(target: Target) -> list[KernelEntry]:
    """Plain memories at batch 1 and 64, buffered and as gated delta rule, and the norm at widths 64 and 128."""
    found = []
    plain, to_zero = ("weight", "bias", "base"), ("base",)
    no_momentum = ("momentum", "log_momentum", "momentum_rows")
    for width, batch, chunk, absent in (
        (128, 1, 16, plain), (128, 64, 64, (*plain, "mask")), (128, 64, 1, (*plain, *no_momentum)),
        (256, 64, 16, ("weight", "bias")), (64, 64, 16, ()), (128, 1, 64, to_zero),
    ):  # fmt: skip
        norm = "weight" not in absent
        cut = plan(batch, 16, width, width, chunk, norm, target.processors)
        constants = {"K": width, "V": width, "CHUNK": chunk, "DECAY_FIRST": chunk == 1, **cut.constants}
        constants |= dict.fromkeys(absent)
        types = entry_types(linear_decode_kernel, {*constants, "PRECISION"})
        name = f"linear decode{' norm' if norm else ''} D{width} B{batch} grid {chunk}"
        found.append(KernelEntry(name, linear_decode_kernel, types, constants, cut.num_warps, 1, chunk > 1))
    return found
