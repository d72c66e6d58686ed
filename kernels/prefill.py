"""The chunk form: rows on the grid, coefficients of all tiles at once, then a scan over tiles."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from . import coefficients
from .anchored_linear.chunk import SolveRule, anchor_rows
from .coupling import Coupling
from .grid import RowGrid
from .scan import Tensors, scan
from .state import buffered_gates, carried, make_state, rule_of, shared_operands
from .types import Gates, Inputs, State


# Width at which the triangular solve and the two [n, n] products of a tile cost about as much as its state products.
SOLVE_TILE = 64


def uses_solve(inputs: Inputs) -> bool:
    """The plain linear memory with scalar gates takes many gradient chunks in one tile."""
    return inputs.depth == 1 and inputs.norm is None and inputs.kinds == ("head",)


def _tile_width(inputs: Inputs, buffered: int) -> int:
    chunk, time = inputs.options.chunk_size, inputs.q.shape[1]
    if not uses_solve(inputs):
        return chunk
    chunks_needed = -(-(time + buffered) // chunk)
    return chunk * max(1, min(SOLVE_TILE // chunk, chunks_needed))


def _tiles(inputs: Inputs, grid: RowGrid, slots: Sequence[Tensor], gates: Gates) -> Tensors:
    options, ends = inputs.options, grid.ends()
    operands: list[Tensor | None] = [grid.tiles(x) for x in slots]
    step, log_decay, log_momentum = (None if gate is None else grid.tiles(gate).mT for gate in gates)
    all_layers = coefficients.build(step, log_decay, log_momentum)
    for c, kind in zip(all_layers.layers(inputs.depth), inputs.kinds):
        operands += Coupling.from_coefficients(c, ends, kind)
    if uses_solve(inputs):
        operands += anchor_rows(all_layers, options.chunk_size, log_decay, options.decay_before_grad)
    return tuple(operands)


class Slots(NamedTuple):
    """A call laid out on the grid: `[B, S, H, D]` operands and gates."""

    grid: RowGrid
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates

    @classmethod
    def of(cls, inputs: Inputs, state: State | None, tile: Callable[[int], int]) -> "Slots":
        """Lay out a call behind what its state has buffered; `tile` is asked with the most rows that can be."""
        batch, time = inputs.q.shape[:2]
        chunk = inputs.options.chunk_size
        phase = None if state is None or chunk == 1 else state["phase"]
        buffers = {} if phase is None else state
        width = tile(0 if phase is None else chunk - 1)
        grid = RowGrid(batch, time, chunk, width, inputs.mask, phase, inputs.q.device)
        rows = buffered_gates(buffers)
        return cls(
            grid,
            grid.arrange(inputs.q),
            grid.arrange(inputs.k, buffers.get("keys")),
            grid.arrange(inputs.v, buffers.get("values")),
            Gates(*(None if x is None else grid.arrange(x, row) for x, row in zip(inputs.gates, rows))),
        )

    def state(self, inputs: Inputs, carry: tuple[Tensor, ...]) -> State:
        """The state behind the call."""
        k, v = (self.grid.tail(x).to(inputs.precision) for x in (self.k, self.v))
        gates = Gates(*(None if gate is None else self.grid.tail(gate) for gate in self.gates))
        return make_state(inputs, carry, k, v, gates, self.grid.phase)


def chunk_form(inputs: Inputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length in matmul form.

    Args:
        inputs: checked operands.
        state: state to continue from.
        output_final_state: whether to return the state behind the call.
    Returns:
        outputs `[B, T, H, V]` in the working precision, and the final state.
    """
    slots = Slots.of(inputs, state, partial(_tile_width, inputs))
    tiles = _tiles(inputs, slots.grid, slots[1:4], slots.gates)
    if uses_solve(inputs):
        out, carry = scan(SolveRule(), tiles, inputs.base, carried(inputs, state))
    else:
        out, carry = scan(rule_of(inputs), tiles, shared_operands(inputs), carried(inputs, state))
    return slots.grid.collect(out), slots.state(inputs, carry) if output_final_state else None
