"""Both memories as a differentiable op made of Triton kernels (README.md beside this file)."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..coefficients_triton import TileCoefficients
from ..launch import differentiable_op, dot_precision, launch
from .inputs import SlotOptions
from .plan import blocks
from .triton_chain import chain_backward_kernel, chain_kernel
from .triton_read import read_backward_kernel, read_kernel


@dataclass(frozen=True)
class _Call:
    """Sizes of a call."""

    batch: int
    num_tokens: int
    heads: int
    width: int
    slots: int
    tile: int
    itemsize: int

    @classmethod
    def of(cls, q: Tensor, targets: Tensor, chunk_size: int) -> "_Call":
        return cls(*q.shape, targets.shape[-1], chunk_size, q.element_size())

    @property
    def num_tiles(self) -> int:
        return triton.cdiv(self.num_tokens, self.tile)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.num_tokens, self.num_tiles, self.heads

    def scratch(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised `[B, 2 H, NT, ...]` in the dtype of `like`."""
        return like.new_empty(self.batch, 2 * self.heads, self.num_tiles, *shape, dtype=dtype)

    def constants(self, name: str, eps: float) -> dict[str, int | str | float]:
        cut = blocks(self.slots, self.width, self.tile, self.itemsize)
        return cut | {"MAP": name, "EPS": eps, "PRECISION": dot_precision(torch.float32)}


def slot_scan(
    q: Tensor, written: Tensor, targets: Tensor, coefficients: TileCoefficients, start: Tensor, options: SlotOptions
) -> tuple[Tensor, Tensor]:
    """Read all slots into the memories and answer each one from the memories behind it.

    Args:
        q: `[B, S, H, D]`.
        written: `[B, S, 2 H, D]`, of the same dtype.
        targets: `[B, S, H, m]`, likewise.
        coefficients: of tiles of `chunk_size`, for 2 H heads.
        start: memories `[B, 2 H, m, D]` float32.
        options: what defines the function.

    Returns:
        outputs `[B, S, H, D]` in the dtype of `q`, and the memories at the last boundary.
    """
    # A head has one set of gates here.
    grad, rows, ends = (x.squeeze(2) for x in coefficients)
    function = (options.write_map, options.write_eps, options.read_map, options.read_eps, options.hypergrad)
    q, written, targets, start = (x.contiguous() for x in (q, written, targets, start))
    return _scan(q, written, targets, grad, rows, ends, start, options.chunk_size, *function)


def _states(
    call: _Call, written: Tensor, targets: Tensor, rows: Tensor, ends: Tensor, start: Tensor, name: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Memories in front of every chunk, directions, and the memories at the end."""
    constants = call.constants(name, eps)
    states = call.scratch(written, call.slots, call.width)
    directions = call.scratch(written, constants["BLOCK"], call.slots)
    last = torch.empty_like(start)
    launch(
        chain_kernel, call.batch * 2 * call.heads, written, targets, rows, ends, start, states, directions, last,
        *call.sizes, **constants,
    )  # fmt: skip
    return states, directions, last


def _forward(
    q: Tensor, written: Tensor, targets: Tensor, grad: Tensor, rows: Tensor, ends: Tensor, start: Tensor,
    chunk_size: int, write_map: str, write_eps: float, read_map: str, read_eps: float, hypergrad: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _Call.of(q, targets, chunk_size)
    states, directions, last = _states(call, written, targets, rows, ends, start, write_map, write_eps)
    out = torch.empty_like(q)
    launch(
        read_kernel, call.batch * call.heads * call.num_tiles, q, written, states, directions, grad, rows, out,
        *call.sizes, **call.constants(read_map, read_eps),
    )  # fmt: skip
    return out, last


def _backward(
    cot_out: Tensor, cot_last: Tensor,
    q: Tensor, written: Tensor, targets: Tensor, grad: Tensor, rows: Tensor, ends: Tensor, start: Tensor,
    chunk_size: int, write_map: str, write_eps: float, read_map: str, read_eps: float, hypergrad: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call.of(q, targets, chunk_size)
    states, directions, _ = _states(call, written, targets, rows, ends, start, write_map, write_eps)
    cot_q, cot_written, cot_grad = (torch.empty_like(x) for x in (q, written, grad))
    cot_rows, cot_ends = torch.zeros_like(rows), torch.zeros_like(ends)
    cot_states = call.scratch(grad, call.slots, call.width)
    cot_directions = call.scratch(grad, directions.shape[-2], call.slots)
    launch(
        read_backward_kernel, call.batch * call.heads * call.num_tiles,
        q, written, states, directions, grad, rows, cot_out.contiguous(),
        cot_q, cot_written, cot_states, cot_directions, cot_grad, cot_rows,
        *call.sizes, **call.constants(read_map, read_eps),
    )  # fmt: skip
    cot_targets = grad.new_empty(*written.shape[:3], call.slots)
    cot_start = torch.empty_like(start)
    launch(
        chain_backward_kernel, call.batch * 2 * call.heads,
        written, targets, rows, ends, states, directions, cot_directions, cot_states, cot_last.contiguous(),
        cot_written, cot_targets, cot_rows, cot_ends, cot_start,
        *call.sizes, hypergrad, **call.constants(write_map, write_eps),
    )  # fmt: skip
    cot_targets = cot_targets.unflatten(2, (2, -1)).sum(2).to(targets.dtype)
    return cot_q, cot_written, cot_targets, cot_grad, cot_rows, cot_ends, cot_start


def _save(inputs: tuple, outputs: tuple) -> tuple[list[Tensor | None], list]:
    return list(inputs[:7]), list(inputs[7:])


def _spread(gradients: tuple[Tensor, ...], numbers: list) -> tuple[Tensor | None, ...]:
    return (*gradients, *[None] * len(numbers))


_scan = differentiable_op("two_pass_slots", _forward, _backward, _save, _spread)
