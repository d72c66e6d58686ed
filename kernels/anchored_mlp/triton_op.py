"""The anchored memories of one chunk per tile as Triton kernels: depth 2, and depth 1 with LayerNorm and residual.

README.md beside this file has the mathematics, the bytes and the floor.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
import triton
from torch import Tensor

from ..coefficients_triton import TileCoefficients
from ..launch import dot_precision, launch
from ..types import Norm
from .plan import Memory, cut, device_of, group_of, padded, unsupported
from .triton_advance import advance_kernel
from .triton_finish import base_kernel, keys_kernel
from .triton_read import read_kernel
from .triton_read_backward import read_backward_kernel
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

    Raises:
        ValueError: for a memory that the kernels are not made for.
    """
    depth = coefficients.grad.shape[2]
    if reason := unsupported(depth, q.shape[-1], v.shape[-1], tile, norm is not None):
        raise ValueError(f"The kernels of anchored memories are {reason}.")
    shapes = [x.shape for x in carry]
    packed_base = None if base is None else _pack(base)
    weight, bias = (None, None) if norm is None else (x.contiguous() for x in norm)
    hidden = q.shape[-1] if depth == 1 else carry[0].shape[-1]
    q, k, v = (x.contiguous() for x in (q, k, v))
    tensors = (q, k, v, *coefficients, packed_base, weight, bias, _pack(carry))
    numbers = (depth, hidden, len(carry) > depth, tile, activation, eps)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    scan = _scan if keep or torch.compiler.is_compiling() else _forward
    out, state, _ = scan(*tensors, *numbers, keep)
    parts = state.split([s[-2] * s[-1] for s in shapes], dim=-1)
    return out, tuple(part.unflatten(-1, s[-2:]) for part, s in zip(parts, shapes))


def _pack(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.float().flatten(-2) for x in matrices], dim=-1)


class _Walk:
    """One call: its sizes, its compile-time constants, and scratch for a group of tiles."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, base, weight, bias, state: Tensor, numbers: tuple, keep: bool
    ) -> None:
        depth, hidden, has_momentum, tile, activation, self.eps = numbers
        self.operands, (self.batch, self.num_tokens, self.heads, width) = (q, k, v), q.shape
        self.num_tiles, self.programs = triton.cdiv(self.num_tokens, tile), self.batch * self.heads
        self.group = group_of(self.num_tiles)
        # Operands that a kernel does not touch when they are absent still need an address.
        self.shared = [state if x is None else x for x in (base, weight, bias)]
        self.constants = {
            "DEPTH": depth, "TILE": tile, "BLOCK": padded(tile), "WIDTH": width, "BLOCK_D": padded(width),
            "HIDDEN": hidden, "HAS_BASE": base is not None, "HAS_NORM": weight is not None,
            "HAS_MOMENTUM": has_momentum, "PRECISION": dot_precision(q.dtype),
        }  # fmt: skip
        self.activation = activation
        self.memory = Memory(depth, width, hidden, tile, q.element_size())
        self.device = device_of(q.device)
        self.sizes = (self.num_tokens, self.num_tiles, self.programs, self.heads)
        rows = (self.group, self.batch, self.heads)
        block = padded(tile)
        self.states = state.new_empty(self.group + 1, *state.shape)
        # What each plane holds is listed in `triton_tiles.py`.
        planes = (8 if keep else 3) if depth > 1 else int(keep)
        self.wide = q.new_empty(*rows, planes, block, hidden)
        self.narrow = q.new_empty(*rows, 3 if keep else 1, block, width)
        self.sums = state.new_empty(*rows, 4 if keep else 0, block, width)
        self.scores = state.new_empty(*rows, block, block if keep else 0)

    def cut(self, kernel: str) -> dict[str, object]:
        """Compile-time constants of one kernel."""
        return self.constants | asdict(cut(kernel, self.memory, self.device))

    def groups(self) -> list[tuple[int, int]]:
        """First tile and number of tiles of each group."""
        starts = range(0, self.num_tiles, self.group)
        return [(first, min(self.group, self.num_tiles - first)) for first in starts]

    def advance(self, rows: Tensor, ends: Tensor, first: int, count: int, keep: bool) -> None:
        _, k, v = self.operands
        launch(
            advance_kernel, self.programs, k, v, rows, ends, *self.shared, self.states, self.wide, self.narrow,
            self.sums, self.num_tokens, self.num_tiles, first, count, self.heads, self.eps,
            ACT=self.activation, KEEP=keep, **self.cut("advance"),
        )  # fmt: skip

    def read(self, grad: Tensor, rows: Tensor, first: int, count: int, out: Tensor, keep: bool) -> None:
        q, k, _ = self.operands
        launch(
            read_kernel, self.programs * count, q, k, grad, rows, *self.shared, self.states, self.wide, self.narrow,
            self.sums, self.scores, out, self.num_tokens, self.num_tiles, first, self.programs, self.heads, self.eps,
            ACT=self.activation, KEEP=keep, **self.cut("read"),
        )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, ends: Tensor,
    base: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: Tensor,
    depth: int, hidden: int, has_momentum: bool, tile: int, activation: str, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    walk = _Walk(q, k, v, base, weight, bias, state, (depth, hidden, has_momentum, tile, activation, eps), False)
    out = torch.empty_like(v)
    groups = walk.groups()
    kept = state.new_empty(len(groups) if keep else 0, *state.shape)
    walk.states[0] = state
    for i, (first, count) in enumerate(groups):
        if keep:
            kept[i] = walk.states[0]
        walk.advance(rows, ends, first, count, keep=False)
        walk.read(grad, rows, first, count, out, keep=False)
        walk.states[0] = walk.states[count]
    return out, walk.states[0].clone(), kept


def _backward(
    cot_out: Tensor, cot_state: Tensor,
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor, ends: Tensor,
    base: Tensor | None, weight: Tensor | None, bias: Tensor | None, kept: Tensor,
    depth: int, hidden: int, has_momentum: bool, tile: int, activation: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Group by group from the end: states again, then reads side by side, then the reverse walk, then the rest."""
    walk = _Walk(q, k, v, base, weight, bias, kept[0], (depth, hidden, has_momentum, tile, activation, eps), True)
    cot_q, cot_k, cot_v = (torch.empty_like(x) for x in (q, k, v))
    cot_grad, cot_rows, cot_ends = (torch.empty_like(x) for x in (grad, rows, ends))
    cot_norm = kept.new_empty(walk.batch, walk.heads, walk.num_tiles, 2, q.shape[-1])
    cot_states = torch.empty_like(walk.states)
    cot_base = kept.new_zeros(0, 0) if base is None else kept.new_zeros(walk.batch, *base.shape)
    cot_out, cot_before = cot_out.contiguous(), cot_state
    num_tokens, num_tiles, programs, heads = walk.sizes
    scratch = (walk.wide, walk.narrow, walk.sums)
    for i, (first, count) in reversed(list(enumerate(walk.groups()))):
        walk.states[0] = kept[i]
        cot_states[count] = cot_before
        cot_before = cot_states[0]
        walk.advance(rows, ends, first, count, keep=True)
        walk.read(grad, rows, first, count, cot_out, keep=True)
        launch(
            read_backward_kernel, programs * count, q, k, cot_out, grad, rows, *walk.shared, walk.states, *scratch,
            walk.scores, cot_q, cot_grad, cot_rows, cot_norm, num_tokens, num_tiles, first, programs, heads, eps,
            **walk.cut("read_backward"),
        )  # fmt: skip
        launch(
            reverse_kernel, programs, q, k, v, rows, ends, *walk.shared, walk.states, cot_states, *scratch, cot_v,
            cot_rows, cot_norm, num_tokens, num_tiles, first, count, heads, eps, **walk.cut("reverse"),
        )  # fmt: skip
        launch(
            keys_kernel, programs * count, rows, walk.shared[0], walk.states, cot_states, walk.wide, walk.sums, cot_v,
            cot_k, cot_ends, num_tokens, num_tiles, first, programs, heads, **walk.cut("keys"),
        )  # fmt: skip
        if base is not None:
            constants = {name: x for name, x in walk.cut("base").items() if not name.startswith("HAS_")}
            launch(
                base_kernel, programs * triton.cdiv(hidden, constants["BLOCK_J"]), q, k, walk.wide, walk.narrow,
                cot_base, num_tokens, first, count, programs, heads, **constants,
            )  # fmt: skip
    affine = [kept.new_zeros(0) if weight is None else cot_norm[:, :, :, i].sum((0, 2)) for i in range(2)]
    return [cot_q, cot_k, cot_v, cot_grad, cot_rows, cot_ends, cot_base.sum(0), *affine, cot_states[0].clone()]


# The number of launches depends on the length. An op that torch.compile does not look into keeps one graph for all.
_scan = torch.library.custom_op("hf_memory::anchored_mlp_scan", _forward, mutates_args=())
_scan_backward = torch.library.custom_op("hf_memory::anchored_mlp_scan_backward", _backward, mutates_args=())


@_scan.register_fake
def _fake_forward(q, k, v, grad, rows, ends, base, weight, bias, state, *numbers):
    num_tiles = grad.shape[3]
    groups = -(-num_tiles // group_of(num_tiles)) if numbers[-1] else 0
    return torch.empty_like(v), torch.empty_like(state), state.new_empty(groups, *state.shape)


@_scan_backward.register_fake
def _fake_backward(cot_out, cot_state, q, k, v, grad, rows, ends, base, weight, bias, kept, *numbers):
    gradients = [torch.empty_like(x) for x in (q, k, v, grad, rows, ends)]
    gradients += [q.new_empty(0) if x is None else torch.empty_like(x) for x in (base, weight, bias)]
    return [*gradients, torch.empty_like(cot_state)]


def _setup_context(ctx, inputs, output) -> None:
    _, _, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(*inputs[:9], kept)
    ctx.numbers = inputs[10:16]


def _run_backward(ctx, cot_out: Tensor | None, cot_state: Tensor | None, _):
    saved = ctx.saved_tensors  # once: under gradient checkpointing each look recomputes
    v, kept = saved[2], saved[-1]
    cot_out = torch.zeros_like(v) if cot_out is None else cot_out
    cot_state = kept.new_zeros(kept.shape[1:]) if cot_state is None else cot_state
    gradients = _scan_backward(cot_out, cot_state, *saved, *ctx.numbers)
    absent = [x if x.numel() else None for x in gradients[6:9]]
    return (*gradients[:6], *absent, gradients[9], *[None] * 7)


_scan.register_autograd(_run_backward, setup_context=_setup_context)
