"""The plain linear memory as a differentiable op made of Triton kernels (README.md beside this file)."""

import torch
import triton
from torch import Tensor

from ..coefficients_triton import TileCoefficients
from ..launch import differentiable_op, dot_precision
from .triton_call import LinearCall
from .triton_chain import chain_backward_kernel, chain_kernel
from .triton_parallel import (
    operand_gradients_kernel,
    output_backward_kernel,
    output_kernel,
    tile_gradients_kernel,
)
from .triton_stream import chain_stream_backward_kernel, chain_stream_kernel
from .triton_tiles import prepare_kernel


def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: TileCoefficients,
    base: Tensor | None,
    carry: tuple[Tensor, ...],
    anchored: Tensor,
    chunk_size: int,
    at_decayed: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Read all slots into the memory and answer each one from the memory behind it.

    Args:
        q, k: `[B, S, H, K]`.
        v: `[B, S, H, V]`, of the same dtype.
        coefficients: of the tiles that `plan` cuts.
        base: `[H, K, V]` float32, what forgetting leads to; `None` for zero.
        carry: offset, and momentum if there is one, `[B, H, K, V]` float32.
        anchored: `[B]` int64, slots in front of the last chunk boundary of each row.
        chunk_size: gradient grid.
        at_decayed: take the gradient at the decayed memory; grid 1, no momentum.

    Returns:
        outputs `[B, S, H, V]` in the dtype of `v`, and the carry at the last boundary.
    """
    q, k, v, *carried = (x.contiguous() for x in (q, k, v, *carry))
    offset, momentum = carried if len(carry) == 2 else (*carried, None)
    base = None if base is None else base.contiguous()
    out, *after = _scan(q, k, v, *coefficients, base, offset, momentum, anchored, chunk_size, at_decayed)
    return out, tuple(after[: len(carry)])


def _states(
    call: LinearCall, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, ends: Tensor, base: Tensor | None,
    offset: Tensor, momentum: Tensor | None, anchored: Tensor, keep: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Directions and states of all tiles: what forward and backward both need."""
    block, shape = call.plan.block, (call.key_width, call.value_width)
    w = f = system = inverse = None
    u = call.scratch(v, block, call.value_width)
    if call.solves:
        w = call.scratch(k, block, call.key_width)
        f = call.scratch(k, block, call.key_width) if call.has_momentum else None
        inverse = call.scratch(k, block, block) if keep else None
        system = call.scratch(grad, block, block) if keep and k.dtype == torch.float32 else None
        call.launch(
            prepare_kernel, call.tiles, k, v, base, grad, rows, w, f, u, system, inverse,
            KEEP=keep, SOLVE_PRECISION=dot_precision(k.dtype),
        )  # fmt: skip
    states = call.scratch(k, *shape)
    momenta = call.scratch(k, *shape) if call.has_momentum else None
    last_offset = torch.empty_like(offset)
    last_momentum = offset.new_empty(0) if momentum is None else torch.empty_like(momentum)
    if call.plan.streams:
        offset, momentum = offset.clone(), None if momentum is None else momentum.clone()
    call.launch(
        chain_stream_kernel if call.plan.streams else chain_kernel, call.chains,
        k, v, w, f, u, base, rows, ends, anchored, offset, momentum, states, momenta, last_offset, last_momentum,
    )  # fmt: skip
    return w, f, u, system, inverse, states, momenta, last_offset, last_momentum


def _forward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, ends: Tensor, base: Tensor | None,
    offset: Tensor, momentum: Tensor | None, anchored: Tensor, chunk_size: int, at_decayed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = LinearCall.of(q, v, base, momentum, chunk_size, at_decayed)
    _, _, u, _, _, states, momenta, *last = _states(
        call, k, v, grad, rows, ends, base, offset, momentum, anchored, keep=False
    )
    out = torch.empty_like(v)
    columns = triton.cdiv(call.value_width, call.plan.value_block)
    call.launch(output_kernel, call.tiles * columns, q, k, u, base, grad, rows, states, momenta, out)
    return out, *last


def _backward(
    cot_out: Tensor, cot_last_offset: Tensor, cot_last_momentum: Tensor,
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, ends: Tensor, base: Tensor | None,
    offset: Tensor, momentum: Tensor | None, anchored: Tensor, chunk_size: int, at_decayed: bool,
) -> list[Tensor]:  # fmt: skip
    call = LinearCall.of(q, v, base, momentum, chunk_size, at_decayed)
    block = call.plan.block
    cot_out = cot_out.contiguous()
    w, f, u, system, inverse, states, momenta, *_ = _states(
        call, k, v, grad, rows, ends, base, offset, momentum, anchored, keep=True
    )
    cot_u = torch.empty_like(u)
    call.launch(output_backward_kernel, call.tiles, q, k, grad, cot_out, cot_u)
    cot_states = torch.empty_like(states)
    cot_momenta = None if momenta is None else torch.empty_like(momenta)
    cot_offset = torch.zeros_like(offset)
    cot_momentum = offset.new_empty(0) if momentum is None else torch.zeros_like(offset)
    streams = [torch.zeros_like(offset) if call.tiles_per_chunk > 1 else None] if call.plan.streams else []
    call.launch(
        chain_stream_backward_kernel if call.plan.streams else chain_backward_kernel, call.chains,
        q, k, w, f, cot_out, cot_u, rows, ends, anchored,
        cot_last_offset.contiguous(), None if momentum is None else cot_last_momentum.contiguous(),
        cot_states, cot_momenta, cot_offset, cot_momentum, *streams,
    )  # fmt: skip
    cot_q, cot_k, cot_v, cot_grad = (torch.empty_like(x) for x in (q, k, v, grad))
    weights = call.scratch(k, block, block)
    gram = call.scratch(k, block, block) if call.solves else None
    call.launch(
        tile_gradients_kernel, call.tiles,
        q, k, u, cot_out, cot_u, system, inverse, grad, rows, cot_v, cot_grad, weights, gram,
        SOLVE_PRECISION=dot_precision(k.dtype),
    )  # fmt: skip
    blocks = triton.cdiv(call.key_width, call.plan.gradient_block)
    cot_rows, cot_ends = call.scratch(grad, blocks, 4, block), call.scratch(grad, blocks, 4)
    call.launch(
        operand_gradients_kernel, call.tiles * blocks,
        q, k, u, cot_out, cot_v, base, rows, states, momenta, cot_states, cot_momenta, weights, gram,
        cot_q, cot_k, cot_rows, cot_ends,
    )  # fmt: skip
    cot_base = offset.new_empty(0)
    if base is not None:
        cot_base = torch.einsum("bthk,bthv->hkv", q.float(), cot_out.float())
        cot_base -= torch.einsum("bthk,bthv->hkv", k.float(), cot_v.float())
    # One axis of gate sets stands behind the heads.
    cot_rows, cot_ends = cot_rows.sum(3).unsqueeze(2), cot_ends.sum(3).unsqueeze(2)
    return [cot_q, cot_k, cot_v, cot_grad, cot_rows, cot_ends, cot_base, cot_offset, cot_momentum]


def _save(inputs: tuple, outputs: tuple) -> tuple[list[Tensor | None], list]:
    return list(inputs[:10]), list(inputs[10:])


def _spread(gradients: tuple[Tensor, ...], numbers: list) -> tuple[Tensor | None, ...]:
    return (*(x if x.numel() else None for x in gradients), None, None, None)


_scan = differentiable_op("anchored_linear", _forward, _backward, _save, _spread)
