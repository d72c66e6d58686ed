"""The anchored memories of one chunk per tile as Triton kernels: depth 2, and depth 1 with LayerNorm and residual.

README.md beside this file has the mathematics, the bytes and the floor.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..coefficients_triton import TileCoefficients
from ..launch import differentiable_op, dot_precision, launch
from ..types import Norm
from .triton_forward import advance_kernel
from .triton_plan import Cut, Memory, group_of, padded
from .triton_reads import reads_kernel
from .triton_reverse import reverse_kernel


def mlp_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: TileCoefficients,
    base: Sequence[Tensor] | None,
    norm: Norm | None,
    carry: Sequence[Tensor],
    *,
    activation: str,
    eps: float,
    tile: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Walk an anchored memory over its tiles, each of which is one chunk.

    Args:
        q: queries `[B, S, H, D]`, one dtype with k and v.
        k: keys, same shape.
        v: values, same shape.
        coefficients: of `tile` tokens each, one set per layer.
        base: what the memory decays to, `[H, in, out]` float32 per layer; `None` for zero.
        norm: affine of the LayerNorm, `[H, D]` float32 each; `None` (depth 2 only) drops it and the residual.
        carry: offsets of the layers, then their momenta (if any), `[B, H, in, out]` float32.
        activation: between two layers.
        eps: of the LayerNorm.
        tile: tokens of a chunk, 1 to 64.

    Returns:
        outputs `[B, S, H, D]` in the dtype of v, and the carry behind the last tile. Differentiable for every tensor.
    """
    depth = coefficients.grad.shape[2]
    shapes = [x.shape for x in carry]
    packed_base = None if base is None else _pack(base)
    weight, bias = (None, None) if norm is None else (x.contiguous() for x in norm)
    numbers = (depth, carry[0].shape[-1] if depth > 1 else q.shape[-1], len(carry) > depth, tile, activation, eps)
    out, state, _ = _scan(
        q.contiguous(), k.contiguous(), v.contiguous(), *coefficients, packed_base, weight, bias, _pack(carry), *numbers
    )  # fmt: skip
    parts = state.split([s[-2] * s[-1] for s in shapes], dim=-1)
    return out, tuple(part.unflatten(-1, s[-2:]) for part, s in zip(parts, shapes))


def _pack(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.float().flatten(-2) for x in matrices], dim=-1)


def _constants(
    q: Tensor, base: Tensor | None, weight: Tensor | None, numbers: tuple[int, int, bool, int, str, float]
) -> dict[str, object]:
    depth, hidden, has_momentum, tile, activation, _ = numbers
    width = q.shape[-1]
    return {
        "DEPTH": depth, "TILE": tile, "BLOCK": padded(tile), "WIDTH": width, "BLOCK_D": padded(width),
        "HIDDEN": hidden, "ACT": activation, "HAS_BASE": base is not None, "HAS_NORM": weight is not None,
        "HAS_MOMENTUM": has_momentum, "PRECISION": dot_precision(),
        "BLOCK_J": 16, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, ends: Tensor,
    base: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: Tensor,
    depth: int, hidden: int, has_momentum: bool, tile: int, activation: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = (depth, hidden, has_momentum, tile, activation, eps)
    batch, num_tokens, heads, _ = q.shape
    num_tiles = triton.cdiv(num_tokens, tile)
    group = group_of(num_tiles)
    out, state = torch.empty_like(v), state.clone()
    kept = state.new_empty(triton.cdiv(num_tiles, group), *state.shape)
    launch(
        advance_kernel, batch * heads, q, k, v, grad, rows, ends, *_or(state, base, weight, bias), state, out, kept,
        state, num_tokens, num_tiles, 0, num_tiles, group, heads, eps,
        READ=True, KEEP=True, **_constants(q, base, weight, numbers),
    )  # fmt: skip
    return out, state, kept


def _or(spare: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Operands that a kernel does not touch when they are absent still need an address."""
    return [spare if x is None else x for x in tensors]


def _backward(
    cot_out: Tensor, cot_state: Tensor, cot_kept: Tensor,
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, ends: Tensor,
    base: Tensor | None, weight: Tensor | None, bias: Tensor | None, kept: Tensor,
    depth: int, hidden: int, has_momentum: bool, tile: int, activation: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    numbers = (depth, hidden, has_momentum, tile, activation, eps)
    constants = _constants(q, base, weight, numbers)
    batch, num_tokens, heads, width = q.shape
    programs, num_tiles, block = batch * heads, triton.cdiv(num_tokens, tile), padded(tile)
    group = group_of(num_tiles)
    rows_of = (group, batch, heads, block)
    states = q.new_empty(group, *kept.shape[1:])
    preactivation, cot_u_last, cot_k_rows = (kept.new_empty(*rows_of, width) for _ in range(3))
    cot_x, cot_u = (kept.new_empty(*rows_of, hidden) for _ in range(2))
    y_rows, r_rows = (q.new_empty(*rows_of, hidden) for _ in range(2))
    cot_r = q.new_empty(*rows_of, width)
    cot_q, cot_k, cot_v = (torch.empty_like(x) for x in (q, k, v))
    cot_grad, cot_rows, cot_ends = (torch.empty_like(x) for x in (grad, rows, ends))
    cot_norm = kept.new_empty(batch, heads, num_tiles, 2, width)
    cot_state = cot_state.contiguous().clone()
    cot_base = kept.new_zeros(0, 0) if base is None else kept.new_zeros(batch, *base.shape)
    cot_out = cot_out.contiguous()
    shared = _or(kept, base, weight, bias)
    for first in reversed(range(0, num_tiles, group)):
        count = min(group, num_tiles - first)
        launch(
            advance_kernel, programs, q, k, v, grad, rows, ends, *shared, kept[first // group].clone(), cot_q, states,
            preactivation, num_tokens, num_tiles, first, first + count, 1, heads, eps,
            READ=False, KEEP=True, **constants,
        )  # fmt: skip
        launch(
            reads_kernel, programs * count, q, k, v, cot_out, grad, rows, *shared, states, preactivation,
            cot_q, cot_grad, cot_rows, cot_norm, y_rows, r_rows, cot_x, cot_u, cot_r, cot_u_last, cot_k_rows,
            num_tokens, num_tiles, first, programs, heads, eps, **constants,
        )  # fmt: skip
        launch(
            reverse_kernel, programs, q, k, v, rows, ends, *shared, states, preactivation, y_rows, r_rows, cot_x,
            cot_u, cot_r, cot_u_last, cot_k_rows, cot_state, cot_base, cot_k, cot_v, cot_rows, cot_ends, cot_norm,
            num_tokens, num_tiles, first, count, heads, eps, **constants,
        )  # fmt: skip
    cot_weight, cot_bias = (
        kept.new_zeros(0) if weight is None else cot_norm[:, :, :, i].sum((0, 2)) for i in range(2)
    )  # fmt: skip
    return [
        cot_q, cot_k, cot_v, cot_grad, cot_rows, cot_ends, cot_base.sum(0), cot_weight, cot_bias, cot_state,
    ]  # fmt: skip


def _save(inputs: tuple, outputs: tuple) -> tuple[list[Tensor | None], list]:
    return [*inputs[:9], outputs[2]], list(inputs[10:])


def _spread(gradients: tuple[Tensor, ...], numbers: list) -> tuple[Tensor | None, ...]:
    absent = [x if x.numel() else None for x in gradients[6:9]]
    return (*gradients[:6], *absent, gradients[9], *[None] * len(numbers))


_scan = differentiable_op("anchored_mlp_scan", _forward, _backward, _save, _spread)
