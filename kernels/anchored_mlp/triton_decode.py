"""One token of an anchored memory in one launch, in place: `decode.py` beside this file, for gates that are scalars.

A two-layer memory has one program per head and row: its second layer and its norm need the whole first one. The
program goes twice over the hidden units, block by block: up to the second layer's error, then back through the first
layer and on to the answer. Memories of depth 1 are in `anchored_linear/triton_decode.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..anchored_linear.triton_decode import decode as decode_matrix
from ..compiled import KernelEntry, Target
from ..decode_launch import can_run, entry_types, in_place_op, whole_heads, writable
from ..decode_rows import (
    MAX_ROWS,
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
from ..state import memory_name
from ..types import Inputs, State
from .triton_math import activation, descent, output


MAX_WIDTH = 256
"""Width of keys and values that one program holds."""


class Plan(NamedTuple):
    """How a launch is cut: block sizes (those of `fold` in both directions) and warps."""

    block_k: int
    block_v: int
    block_n: int
    block_rows: int
    fold: tuple[int, int]
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes."""
        blocks = {"BLOCK_K": self.block_k, "BLOCK_V": self.block_v}
        blocks |= {"BLOCK_N": self.block_n, "BLOCK_ROWS": self.block_rows}
        return blocks | {"FOLD_K": self.fold[0], "FOLD_V": self.fold[1]}


def plan(programs: int, key_width: int, value_width: int, hidden: int, chunk: int, processors: int) -> Plan:
    """Cut a launch: blocks of hidden units whose matrices take 16 registers of a thread each.

    A program that has a multiprocessor to itself takes twice the warps and the block; otherwise three programs share
    one.
    """
    block_k, block_v = (max(16, triton.next_power_of_2(width)) for width in (key_width, value_width))
    num_warps = 8 if programs <= processors else 4
    widest = max(block_k, block_v)
    block_n = max(16, min(triton.next_power_of_2(hidden), 512 * num_warps // widest))
    # Tiles of a fold that keep the registers of all targets from spilling, found with the compile check.
    return Plan(block_k, block_v, block_n, max(16, triton.next_power_of_2(chunk)), (32, 32), num_warps)


@triton.jit
def load_layer(memory, momentum, base, series, head, at, inside, SIZE: tl.constexpr):
    """Block of a layer's offset, momentum and base (zero where there is none)."""
    d = tl.load(memory + series * SIZE + at, mask=inside, other=0.0)
    s, w = tl.zeros_like(d), tl.zeros_like(d)
    if momentum is not None:
        s = tl.load(momentum + series * SIZE + at, mask=inside, other=0.0)
    if base is not None:
        w = tl.load(base + head * SIZE + at, mask=inside, other=0.0)
    return d, s, w


@triton.jit
def forward_units(
    key, query, weights, beta, f, base_0, base_1, memory_0, memory_1, momentum_0, feature, direction_0,
    series, head, p, columns, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Second pre-activation of the key. Leaves the first ones, of key and query, in row p of the buffers."""
    i, s = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_ROWS)
    z_1 = tl.zeros_like(columns).to(tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = (i < K)[:, None] & (j < N)[None, :]
        d, pace, w = load_layer(
            memory_0, momentum_0, base_0, series, head, i[:, None] * N + j[None, :], inside, K * N
        )  # fmt: skip
        z = tl.sum(key[:, None] * (w + d), axis=0)
        r = tl.sum(query[:, None] * (w + beta * d + f * pace), axis=0)
        r += sum_rows(direction_0, weights, s, series, j, p, tl.zeros_like(z), CHUNK, N)
        at = (series * CHUNK + p) * N + j
        tl.store(direction_0 + at, z, mask=j < N)
        tl.store(feature + at, r, mask=j < N)
        x, _, _ = activation(z, ACT)
        inside = (j < N)[:, None] & (columns < V)[None, :]
        d, _, w = load_layer(memory_1, None, base_1, series, head, j[:, None] * V + columns[None, :], inside, N * V)
        z_1 += tl.sum(x[:, None] * (w + d), axis=0)
    return z_1


@triton.jit
def backward_units(
    u_1, weight, beta, f, base_1, memory_1, momentum_1, feature, direction_0, series, head, p, columns,
    V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Second pre-activation of the query but for the buffered rows, and its score with each of them.

    Row p of the buffers gets what belongs there: the features and directions of the hidden units.
    """
    s = tl.arange(0, BLOCK_ROWS)
    r_1 = tl.zeros_like(u_1)
    scores = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = (series * CHUNK + p) * N + j
        z = tl.load(direction_0 + at, mask=j < N, other=0.0)
        r = tl.load(feature + at, mask=j < N, other=0.0)
        inside = (j < N)[:, None] & (columns < V)[None, :]
        d, pace, w = load_layer(
            memory_1, momentum_1, base_1, series, head, j[:, None] * V + columns[None, :], inside, N * V
        )  # fmt: skip
        x, slope, _ = activation(z, ACT)
        u = tl.sum((w + d) * u_1[None, :], axis=1) * slope
        y, _, _ = activation(r + weight * u, ACT)
        r_1 += tl.sum(y[:, None] * (w + beta * d + f * pace), axis=0)
        scores += tl.sum(buffer_tile(feature, series, s, j, p, x, CHUNK, N) * y[None, :], axis=1)
        tl.debug_barrier()  # every warp has read z and r
        tl.store(direction_0 + at, u, mask=j < N)
        tl.store(feature + at, x, mask=j < N)
    return r_1, scores


@triton.jit
def fold_layer(
    memory, momentum, inputs, directions, coefficients, series, s,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, FOLD_K: tl.constexpr, FOLD_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Move the anchor of a layer behind its full buffers."""
    beta, f, m, grad, grad_momentum = coefficients
    for start in range(0, V, FOLD_V):
        fold_matrix(
            memory, momentum, inputs, directions, series, s, start + tl.arange(0, FOLD_V),
            beta, f, m, grad, grad_momentum, K, V, CHUNK, FOLD_K, PRECISION,
        )  # fmt: skip


@triton.jit
def empty_buffers(
    keys, values, step_rows, decay_rows, momentum_rows, feature, direction_0, direction_1, series,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Zero all rows of one head."""
    fill_zero(keys, series * CHUNK * K, CHUNK * K, 1024)
    fill_zero(values, series * CHUNK * V, CHUNK * V, 1024)
    fill_zero(feature, series * CHUNK * N, CHUNK * N, 1024)
    fill_zero(direction_0, series * CHUNK * N, CHUNK * N, 1024)
    fill_zero(direction_1, series * CHUNK * V, CHUNK * V, 1024)
    fill_zero(step_rows, series * CHUNK * 2, CHUNK * 2, 128)
    if decay_rows is not None:
        fill_zero(decay_rows, series * CHUNK * 2, CHUNK * 2, 128)
    if momentum_rows is not None:
        fill_zero(momentum_rows, series * CHUNK * 2, CHUNK * 2, 128)


@triton.jit
def mlp_decode_kernel(
    q, k, v, step, log_decay, log_momentum, base_0, base_1, weight, bias, mask, out,
    memory_0, memory_1, momentum_0, momentum_1, keys, values, step_rows, decay_rows, momentum_rows,
    feature, direction_0, direction_1, phase, q_stride, k_stride, v_stride, H, eps,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, ACT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    FOLD_K: tl.constexpr, FOLD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    series = tl.program_id(0).to(tl.int64)
    row, head = series // H, series % H
    i, s, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_V)
    if mask is not None:
        if not tl.load(mask + row):
            tl.store(out + series * V + columns, tl.zeros([BLOCK_V], tl.float32), mask=columns < V)
            return
    p = phase_of(phase, row)
    query = tl.load(q + row * q_stride + head * K + i, mask=i < K, other=0.0).to(tl.float32)
    key = tl.load(k + row * k_stride + head * K + i, mask=i < K, other=0.0).to(tl.float32)
    value = tl.load(v + row * v_stride + head * V + columns, mask=columns < V, other=0.0).to(tl.float32)
    first = newest_coefficients(
        step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, 0, p, 2, CHUNK, BLOCK_ROWS
    )
    second = newest_coefficients(
        step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, 1, p, 2, CHUNK, BLOCK_ROWS
    )
    weights = first[3] * tl.sum(buffer_tile(keys, series, s, i, p, key, CHUNK, K) * query[None, :], axis=1)
    z = forward_units(
        key, query, weights, first[0], first[1], base_0, base_1, memory_0, memory_1, momentum_0, feature, direction_0,
        series, head, p, columns, K, V, N, CHUNK, BLOCK_K, BLOCK_N, BLOCK_ROWS, ACT,
    )  # fmt: skip
    has_norm: tl.constexpr = weight is not None
    gamma, shift, as_key, as_query, inside = z, z, z[None, :], z[None, :], (columns < V)[None, :]
    if has_norm:
        gamma = tl.load(weight + head * V + columns, mask=columns < V, other=0.0)
        shift = tl.load(bias + head * V + columns, mask=columns < V, other=0.0)
        own = head * V + columns
        as_key = tl.load(k + row * k_stride + own, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        as_query = tl.load(q + row * q_stride + own, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    u = tl.sum(descent(z[None, :], as_key, value[None, :], gamma, shift, inside, eps, V, has_norm), axis=0)
    tl.debug_barrier()  # row p of the buffers is written
    r, scores = backward_units(
        u, tl.sum(tl.where(s == p, weights, 0.0), axis=0), second[0], second[1], base_1, memory_1, momentum_1,
        feature, direction_0, series, head, p, columns, V, N, CHUNK, BLOCK_N, BLOCK_ROWS, ACT,
    )  # fmt: skip
    r += sum_rows(direction_1, second[3] * scores, s, series, columns, p, u, CHUNK, V)
    answer = output(as_query, r[None, :], gamma, shift, inside, eps, V, has_norm)
    tl.store((out + series * V + columns)[None, :], answer, mask=inside)
    at = series * CHUNK + p
    tl.store(keys + at * K + i, key, mask=i < K)
    tl.store(values + at * V + columns, value, mask=columns < V)
    tl.store(direction_1 + at * V + columns, u, mask=columns < V)
    if p == CHUNK - 1:
        tl.debug_barrier()  # row p of the buffers is written
        fold_layer(memory_0, momentum_0, keys, direction_0, first, series, s, K, N, CHUNK, FOLD_K, FOLD_V, PRECISION)
        fold_layer(
            memory_1, momentum_1, feature, direction_1, second, series, s, N, V, CHUNK, FOLD_K, FOLD_V, PRECISION
        )
        tl.debug_barrier()  # every warp has read the buffers
        empty_buffers(
            keys, values, step_rows, decay_rows, momentum_rows, feature, direction_0, direction_1, series,
            K, V, N, CHUNK,
        )  # fmt: skip
    else:
        append_gates(step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, 0, p, 2, CHUNK)
        append_gates(step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, 1, p, 2, CHUNK)
    finish(phase, row, p, H, CHUNK)


def _step(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    base_0: Tensor | None, base_1: Tensor | None, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    memory_0: Tensor, memory_1: Tensor, momentum_0: Tensor | None, momentum_1: Tensor | None,
    keys: Tensor, values: Tensor, step_rows: Tensor, decay_rows: Tensor | None, momentum_rows: Tensor | None,
    feature: Tensor, direction_0: Tensor, direction_1: Tensor, phase: Tensor, act: str, eps: float,
) -> Tensor:  # fmt: skip
    (batch, _, heads, key_width), value_width = q.shape, v.shape[-1]
    (chunk, hidden) = feature.shape[2:]
    out = torch.empty(batch, 1, heads, value_width, dtype=v.dtype, device=v.device)
    q, k, v = (whole_heads(x) for x in (q, k, v))
    cut = plan(batch * heads, key_width, value_width, hidden, chunk, multiprocessors(q.device))
    launch(
        mlp_decode_kernel, batch * heads, q, k, v, step, log_decay, log_momentum, base_0, base_1, weight, bias, mask,
        out, memory_0, memory_1, momentum_0, momentum_1, keys, values, step_rows, decay_rows, momentum_rows,
        feature, direction_0, direction_1, phase, q.stride(0), k.stride(0), v.stride(0), heads, eps,
        K=key_width, V=value_width, N=hidden, CHUNK=chunk, ACT=act,
        **cut.constants, PRECISION=dot_precision(memory_0.dtype), num_warps=cut.num_warps, num_stages=1,
    )  # fmt: skip
    return out


decode_two_layers = in_place_op("mlp_decode", _step, operands=11)


def supports(inputs: Inputs, state: State) -> bool:
    """Whether `decode_step` takes a call; the PyTorch form takes every one."""
    operands = (*inputs[:3], *inputs.gates, *inputs.weights, *(inputs.norm or ()))
    return (
        can_run(inputs.q, operands, state)
        and inputs.depth <= 2
        and set(inputs.kinds) == {"head"}
        and inputs.options.chunk_size <= MAX_ROWS
        and max(inputs.q.shape[-1], inputs.v.shape[-1]) <= MAX_WIDTH
    )


def decode_step(inputs: Inputs, state: State) -> tuple[Tensor, State]:
    """Advance every row by one token (rows masked out stay as they are); arguments and results as `decode_form`.

    Args:
        inputs: checked operands with T == 1 that `supports` accepts.
        state: state to continue from; its tensors are overwritten if the options say `overwrite_state`.

    Returns:
        Outputs `[B, 1, H, V]` in the dtype of `v`, and the state behind the token.

    Raises:
        ValueError: for a state that is to be overwritten and has tensors that are not contiguous.
    """
    state = writable(state, inputs.options.overwrite_state)
    name, norm = memory_name(inputs), [x.contiguous() for x in inputs.norm or ()] or (None, None)
    gates = [None if gate is None else gate.contiguous() for gate in inputs.gates]
    bases = [None if base is None else base.contiguous() for base in inputs.base]
    mask = None if inputs.mask is None else inputs.mask.contiguous()
    rows = [state["keys"], state["values"], *(state.get(gate) for gate in inputs.gates._fields)]
    memories = [state[f"{name}_{i}"] for i in range(inputs.depth)]
    memories += [state.get(f"momentum_{i}") for i in range(inputs.depth)]
    rows += [state[f"feature_{i}"] for i in range(1, inputs.depth)]
    rows += [state[f"direction_{i}"] for i in range(inputs.depth)]
    operands = (*inputs[:3], *gates, *bases, *norm, mask, *memories, *rows, state["phase"])
    options = inputs.options
    if inputs.depth == 1:
        return decode_matrix(*operands, options.decay_before_grad, options.eps), state
    return decode_two_layers(*operands, options.activation, options.eps), state


def compile_entries(target: Target) -> list[KernelEntry]:
    """Widths of 64 and 128 at expansion 4 and 2, with and without what is optional."""
    found = []
    bare = ("base_0", "base_1", "weight", "bias", "mask", "momentum_0", "momentum_1", "log_momentum", "momentum_rows")
    for width, expansion, chunk, batch, absent in (
        (64, 4, 16, 64, ()), (64, 4, 16, 1, ("mask",)), (64, 4, 64, 64, ("mask",)), (128, 2, 16, 64, bare),
    ):  # fmt: skip
        cut = plan(batch * 16, width, width, expansion * width, chunk, target.processors)
        constants = {"K": width, "V": width, "N": expansion * width, "CHUNK": chunk, "ACT": "gelu", **cut.constants}
        constants |= dict.fromkeys(absent)
        types = entry_types(mlp_decode_kernel, {*constants, "PRECISION"})
        name = f"deep decode{'' if absent == bare else ' norm'} D{width}x{expansion} B{batch} grid {chunk}"
        found.append(KernelEntry(name, mlp_decode_kernel, types, constants, cut.num_warps, 1))
    return found
