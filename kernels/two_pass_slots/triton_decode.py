"""One token of both memories in one launch, in place: `decode.py` beside this file.

A program has both memories of one head in registers, since the second read needs the whole answer of the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..anchored_linear.triton_tiles import load_matrix, store_matrix
from ..compiled import KernelEntry, Target
from ..decode_launch import can_run, entry_types, in_place_op, whole_heads, writable
from ..decode_rows import (
    FOLDED_ROWS,
    MAX_ROWS,
    append_gates,
    buffer_tile,
    fill_zero,
    finish,
    fold_matrix,
    newest_coefficients,
    phase_of,
    some_rows,
)
from ..launch import dot_precision, launch, multiprocessors
from ..types import State
from .inputs import SlotOperands
from .plan import decode_plan, too_large_to_decode
from .triton_maps import code, map_value


@triton.jit
def load_vector(x, at, SIZE: tl.constexpr):
    """A vector of `SIZE` numbers in float32, zero behind them."""
    return tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32)


@triton.jit
def own_gates(gates, series, SETS: tl.constexpr, SECOND: tl.constexpr):
    """Where the new gate of a memory is, with one set for both memories or one for each; `None` without gates."""
    own = gates
    if gates is not None:
        own = gates + series * SETS + (SETS - 1 if SECOND else 0)
    return own


@triton.jit
def gate_rows(rows, series, CHUNK: tl.constexpr):
    """Where the buffered gates of a memory are."""
    own = rows
    if rows is not None:
        own = rows + series * CHUNK
    return own


@triton.jit
def direction(memory, w, target, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, EPS: tl.constexpr):
    """Descent direction of what is written, over the slots."""
    z = tl.sum(memory * w[None, :], axis=1)
    return -tl.sum(code(z[:, None], target[:, None], M, MB, MAP, EPS, AXIS=0), axis=1)


@triton.jit
def read_rows(
    inputs, directions, series, weights, s, asked, rows, columns, p, newest_input, newest_direction,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, DIRECTION_WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ_s weight_s (x_s · asked) u_s over a buffer, row p being the newest; only rows that exist are read."""
    total = tl.zeros_like(newest_direction)
    for first in range(0, p + 1, FOLDED_ROWS):
        part = first + tl.arange(0, FOLDED_ROWS)
        x = buffer_tile(inputs, series, part, rows, p, newest_input, CHUNK, WIDTH)
        u = buffer_tile(directions, series, part, columns, p, newest_direction, CHUNK, DIRECTION_WIDTH)
        scores = some_rows(weights, s, part) * tl.sum(x * asked[None, :], axis=1)
        total += tl.sum(scores[:, None] * u, axis=0)
    return total


@triton.jit
def step_online(
    memory, before, series, beta, grad, u, w, M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr
):
    """Move a memory behind the token, where every token does."""
    after = beta * before + (tl.sum(grad, axis=0) * u)[:, None] * w[None, :]
    store_matrix(memory + series * M * D, after, 0, 0, M, D, MB, DB)


@triton.jit
def append_row(written, directions, series, d, i, p, w, u, M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Write row p of a memory's buffers."""
    at = series * CHUNK + p
    tl.store(written + at * D + d, w, mask=d < D)
    tl.store(directions + at * M + i, u, mask=i < M)


@triton.jit
def fold_memory(
    memory, written, directions, series, s, beta, grad,
    M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, FOLD_M: tl.constexpr, FOLD_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Move a memory behind its full buffers: S' = β S + Σ_s G_s u_s w_sᵀ."""
    for start in range(0, D, FOLD_D):
        fold_matrix(
            memory, None, directions, written, series, s, start + tl.arange(0, FOLD_D), beta, 0.0, 0.0, grad, grad,
            M, D, CHUNK, FOLD_M, PRECISION,
        )  # fmt: skip


@triton.jit
def empty_rows(
    written, directions, step_rows, decay_rows, series, M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr
):
    """Zero the buffers of a memory."""
    fill_zero(written, series * CHUNK * D, CHUNK * D, 1024)
    fill_zero(directions, series * CHUNK * M, CHUNK * M, 1024)
    fill_zero(step_rows, series * CHUNK, CHUNK, 64)
    if decay_rows is not None:
        fill_zero(decay_rows, series * CHUNK, CHUNK, 64)


@triton.jit
def two_pass_decode_kernel(
    q, k, v, targets, step, log_decay, mask, out,
    memory, written, target_rows, step_rows, decay_rows, directions, phase,
    q_stride, k_stride, v_stride, target_stride, H,
    K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    STEPS: tl.constexpr, DECAYS: tl.constexpr,
    WRITE_MAP: tl.constexpr, WRITE_EPS: tl.constexpr, READ_MAP: tl.constexpr, READ_EPS: tl.constexpr,
    MB: tl.constexpr, DB: tl.constexpr, BLOCK_ROWS: tl.constexpr, FOLD_M: tl.constexpr, FOLD_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    series = tl.program_id(0).to(tl.int64)
    row, head = series // H, series % H
    i, d, s = tl.arange(0, MB), tl.arange(0, DB), tl.arange(0, BLOCK_ROWS)
    if mask is not None:
        if not tl.load(mask + row):
            tl.store(out + series * V + d, tl.zeros([DB], tl.float32), mask=d < V)
            return
    p = phase_of(phase, row)
    first = series + row * H  # of the memory of keys, among 2 H of a row
    second = first + H
    keys = load_matrix(memory + first * M * D, 0, 0, M, D, MB, DB)
    query = load_vector(q + row * q_stride + head * K, d, K)
    key = load_vector(k + row * k_stride + head * K, d, K)
    value = load_vector(v + row * v_stride + head * V, d, V)
    target = load_vector(targets + row * target_stride + head * M, i, M)
    step_k, step_v = own_gates(step, series, STEPS, False), own_gates(step, series, STEPS, True)
    decay_k, decay_v = own_gates(log_decay, series, DECAYS, False), own_gates(log_decay, series, DECAYS, True)
    step_rows_k, step_rows_v = gate_rows(step_rows, first, CHUNK), gate_rows(step_rows, second, CHUNK)
    decay_rows_k, decay_rows_v = gate_rows(decay_rows, first, CHUNK), gate_rows(decay_rows, second, CHUNK)
    beta_k, _, _, grad_k, _ = newest_coefficients(
        step_k, decay_k, None, step_rows_k, decay_rows_k, None, 0, 0, p, 1, CHUNK, BLOCK_ROWS
    )
    beta_v, _, _, grad_v, _ = newest_coefficients(
        step_v, decay_v, None, step_rows_v, decay_rows_v, None, 0, 0, p, 1, CHUNK, BLOCK_ROWS
    )

    u_k = direction(keys, key, target, M, MB, WRITE_MAP, WRITE_EPS)
    found = beta_k * tl.sum(keys * query[None, :], axis=1)
    found += read_rows(written, directions, first, grad_k, s, query, d, i, p, key, u_k, CHUNK, D, M)
    if CHUNK == 1:
        step_online(memory, keys, first, beta_k, grad_k, u_k, key, M, D, MB, DB)
    r = tl.sum(map_value(found[:, None], M, MB, READ_MAP, READ_EPS, AXIS=0), axis=1)
    values = load_matrix(memory + second * M * D, 0, 0, M, D, MB, DB)
    u_v = direction(values, value, target, M, MB, WRITE_MAP, WRITE_EPS)
    y = beta_v * tl.sum(values * r[:, None], axis=0)
    y += read_rows(directions, written, second, grad_v, s, r, i, d, p, u_v, value, CHUNK, M, D)
    tl.store(out + series * V + d, y, mask=d < V)

    if CHUNK == 1:
        step_online(memory, values, second, beta_v, grad_v, u_v, value, M, D, MB, DB)
    else:
        append_row(written, directions, first, d, i, p, key, u_k, M, D, CHUNK)
        append_row(written, directions, second, d, i, p, value, u_v, M, D, CHUNK)
        tl.store(target_rows + (series * CHUNK + p) * M + i, target, mask=i < M)
        if p == CHUNK - 1:
            tl.debug_barrier()  # row p is written
            fold_memory(memory, written, directions, first, s, beta_k, grad_k, M, D, CHUNK, FOLD_M, FOLD_D, PRECISION)
            fold_memory(memory, written, directions, second, s, beta_v, grad_v, M, D, CHUNK, FOLD_M, FOLD_D, PRECISION)
            tl.debug_barrier()  # every warp has read the rows
            empty_rows(written, directions, step_rows, decay_rows, first, M, D, CHUNK)
            empty_rows(written, directions, step_rows, decay_rows, second, M, D, CHUNK)
            fill_zero(target_rows, series * CHUNK * M, CHUNK * M, 1024)
        else:
            append_gates(step_k, decay_k, None, step_rows_k, decay_rows_k, None, 0, 0, p, 1, CHUNK)
            append_gates(step_v, decay_v, None, step_rows_v, decay_rows_v, None, 0, 0, p, 1, CHUNK)
        finish(phase, row, p, H, CHUNK)


def _step(
    q: Tensor, k: Tensor, v: Tensor, targets: Tensor, step: Tensor, log_decay: Tensor | None, mask: Tensor | None,
    memory: Tensor, written: Tensor, target_rows: Tensor, step_rows: Tensor, decay_rows: Tensor | None,
    directions: Tensor, phase: Tensor, write_map: str, write_eps: float, read_map: str, read_eps: float,
) -> Tensor:  # fmt: skip
    (batch, _, heads, key_width), value_width = q.shape, v.shape[-1]
    slots, width, chunk = *memory.shape[-2:], written.shape[2]
    out = torch.empty(batch, 1, heads, value_width, dtype=v.dtype, device=v.device)
    q, k, v, targets = (whole_heads(x) for x in (q, k, v, targets))
    cut = decode_plan(batch * heads, slots, width, chunk, multiprocessors(q.device))
    launch(
        two_pass_decode_kernel, batch * heads, q, k, v, targets, step, log_decay, mask, out,
        memory, written, target_rows, step_rows, decay_rows, directions, phase,
        q.stride(0), k.stride(0), v.stride(0), targets.stride(0), heads,
        K=key_width, V=value_width, D=width, M=slots, CHUNK=chunk,
        STEPS=step.shape[-1], DECAYS=1 if log_decay is None else log_decay.shape[-1],
        WRITE_MAP=write_map, WRITE_EPS=write_eps, READ_MAP=read_map, READ_EPS=read_eps,
        **cut.constants, PRECISION=dot_precision(memory.dtype), num_warps=cut.num_warps, num_stages=1,
    )  # fmt: skip
    return out


_decode = in_place_op("two_pass_decode", _step, operands=7)


def supports(operands: SlotOperands, state: State) -> bool:
    """Whether `decode_step` takes a call; the PyTorch form takes every one."""
    options, slots = operands.options, operands.targets.shape[-1]
    return (
        can_run(operands.q, (*operands[:4], *operands.gates), state)
        and options.refinements == 0
        and options.chunk_size <= MAX_ROWS
        and too_large_to_decode(slots, operands.width) is None
    )


def decode_step(operands: SlotOperands, state: State) -> tuple[Tensor, State]:
    """Advance every row by one token (rows masked out stay as they are).

    Args:
        operands: of one token, which `supports` accepts.
        state: state to continue from; its tensors are overwritten if the options say `overwrite_state`.

    Returns:
        Outputs `[B, 1, H, V]` in the dtype of `v`, and the state behind the token.

    Raises:
        ValueError: for a state that is to be overwritten and has tensors that are not contiguous.
    """
    options = operands.options
    state = writable(state, options.overwrite_state)
    step, log_decay, _ = (None if gate is None else gate.contiguous() for gate in operands.gates)
    mask = None if operands.mask is None else operands.mask.contiguous()
    names = ("memory", "written", "targets", "step", "log_decay", "directions", "phase")
    maps = (options.write_map, options.write_eps, options.read_map, options.read_eps)
    out = _decode(*operands[:4], step, log_decay, mask, *(state.get(name) for name in names), *maps)
    return out, state


def compile_entries(target: Target) -> list[KernelEntry]:
    """The default sizes at batch 1 and 64, the exact recurrence, a long chunk, the largest memories, other maps."""
    found = []
    plain, usual = ("mask", "log_decay", "decay_rows"), ("ln_silu", "ln_silu")
    for slots, width, batch, chunk, absent, (write_map, read_map) in (
        (64, 64, 64, 16, (), usual), (64, 64, 1, 16, ("mask",), usual), (64, 64, 64, 1, (), usual),
        (64, 64, 64, 64, plain, usual), (32, 32, 64, 16, (), usual), (128, 128, 64, 16, (), usual),
        (64, 256, 1, 64, (), usual), (64, 64, 64, 1, ("mask",), ("identity", "identity")),
        (64, 64, 64, 16, (), ("l2_silu", "softmax")),
    ):  # fmt: skip
        cut = decode_plan(batch * 16, slots, width, chunk, target.processors)
        maps = {"WRITE_MAP": write_map, "WRITE_EPS": 1e-3, "READ_MAP": read_map, "READ_EPS": 1e-6}
        sizes = {"K": width, "V": width, "D": width, "M": slots, "CHUNK": chunk, "STEPS": 2, "DECAYS": 1}
        constants = {**sizes, **maps, **cut.constants, **dict.fromkeys(absent)}
        types = entry_types(two_pass_decode_kernel, {*constants, "PRECISION"})
        name = f"two_pass_slots decode {slots}x{width} B{batch} grid {chunk}"
        name += "" if write_map == "ln_silu" else f" {write_map} {read_map}"
        found.append(KernelEntry(name, two_pass_decode_kernel, types, constants, cut.num_warps, 1, chunk > 1))
    return found
