"""The chunk form: rows on the grid, coefficients of all tiles at once, then a scan over tiles."""

from torch import Tensor

from .. import coefficients
from ..anchored_linear.chunk import anchor_rows
from ..coupling import Coupling
from ..grid import RowGrid
from ..scan import Tensors, scan
from ..types import State
from .inputs import SlotInputs, SlotOptions
from .rule import SlotRule, earlier_rows
from .state import buffered_gates, carried, make_state


# Width at which the triangular solve and the products of a tile's rows cost about as much as its state products.
SOLVE_TILE = 64


def uses_solve(options: SlotOptions) -> bool:
    """A linear φ takes many gradient chunks in one tile."""
    return options.write_map == "identity" and options.refinements == 0


def _tile_width(inputs: SlotInputs, buffered: int) -> int:
    chunk, time = inputs.options.chunk_size, inputs.q.shape[1]
    if not uses_solve(inputs.options):
        return chunk
    chunks_needed = -(-(time + buffered) // chunk)
    return chunk * max(1, min(SOLVE_TILE // chunk, chunks_needed))


def _tiles(inputs: SlotInputs, grid: RowGrid, slots: dict[str, Tensor]) -> Tensors:
    options = inputs.options
    q, tiles = grid.tiles(grid.arrange(inputs.q)), {name: grid.tiles(x) for name, x in slots.items()}
    gates = buffered_gates(tiles)
    step, log_decay, _ = (None if gate is None else gate.mT for gate in gates)
    c = coefficients.build(step, log_decay, None)
    operands = (q, tiles["written"], tiles["targets"], *Coupling.from_coefficients(c, grid.ends(), "head"))
    if uses_solve(options):
        return operands + anchor_rows(c, options.chunk_size, log_decay, False)
    return operands + (earlier_rows(gates) if options.refinements else ())


def chunk_form(inputs: SlotInputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length in matmul form.

    Args:
        inputs: checked operands.
        state: state to continue from.
        output_final_state: whether to return the state behind the call.
    Returns:
        outputs `[B, T, H, D]` in the working precision, and the final state.
    """
    batch, time = inputs.q.shape[:2]
    chunk = inputs.options.chunk_size
    phase = None if state is None or chunk == 1 else state["phase"]
    buffers = {} if phase is None else state
    tile = _tile_width(inputs, 0 if phase is None else chunk - 1)
    grid = RowGrid(batch, time, chunk, tile, inputs.mask, phase, inputs.q.device)
    slots = {name: grid.arrange(x, buffers.get(name)) for name, x in inputs.tokens.items()}
    rule = SlotRule.of(inputs.options, uses_solve(inputs.options))
    out, (memory,) = scan(rule, _tiles(inputs, grid, slots), (), (carried(inputs, state),))
    if not output_final_state:
        return grid.collect(out), None
    return grid.collect(out), make_state(inputs, memory, {n: grid.tail(x) for n, x in slots.items()}, grid.phase)
