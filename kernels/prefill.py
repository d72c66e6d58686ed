"""The chunk form: rows on the grid, coefficients of all tiles at once, then a scan over tiles."""

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


def _tiles(inputs: Inputs, grid: RowGrid, slots: list[Tensor], gates: Gates) -> Tensors:
    options, ends = inputs.options, grid.ends()
    operands: list[Tensor | None] = [grid.tiles(x) for x in slots]
    step, log_decay, log_momentum = (None if gate is None else grid.tiles(gate).mT for gate in gates)
    all_layers = coefficients.build(step, log_decay, log_momentum)
    for c, kind in zip(all_layers.layers(inputs.depth), inputs.kinds):
        operands += Coupling.from_coefficients(c, ends, kind)
    if uses_solve(inputs):
        operands += anchor_rows(all_layers, options.chunk_size, log_decay, options.decay_before_grad)
    return tuple(operands)


def chunk_form(inputs: Inputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length in matmul form.

    Args:
        inputs: checked operands.
        state: state to continue from.
        output_final_state: whether to return the state behind the call.
    Returns:
        outputs `[B, T, H, V]` in the working precision, and the final state.
    """
    batch, time, heads, _ = inputs.q.shape
    chunk = inputs.options.chunk_size
    phase = None if state is None or chunk == 1 else state["phase"]
    buffers = {} if phase is None else state
    tile = _tile_width(inputs, 0 if phase is None else chunk - 1)
    grid = RowGrid(batch, time, chunk, tile, inputs.mask, phase, inputs.q.device)

    k = grid.arrange(inputs.k, buffers.get("keys"))
    v = grid.arrange(inputs.v, buffers.get("values"))
    rows = buffered_gates(buffers)
    gates = Gates(*(None if x is None else grid.arrange(x, row) for x, row in zip(inputs.gates, rows)))
    tiles = _tiles(inputs, grid, [grid.arrange(inputs.q), k, v], gates)
    if uses_solve(inputs):
        out, carry = scan(SolveRule(), tiles, inputs.base, carried(inputs, state))
    else:
        out, carry = scan(rule_of(inputs), tiles, shared_operands(inputs), carried(inputs, state))
    if not output_final_state:
        return grid.collect(out), None
    tail = Gates(*(None if gate is None else grid.tail(gate) for gate in gates))
    return grid.collect(out), make_state(inputs, carry, grid.tail(k), grid.tail(v), tail, grid.phase)
