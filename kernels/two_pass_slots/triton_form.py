"""The Triton form: rows on the grid, coefficients of all chunks, then kernels that walk the slots as they lie."""

from torch import Tensor

from ..coefficients_triton import tile_coefficients
from ..grid import RowGrid
from ..types import State
from .inputs import SlotInputs
from .state import buffered_gates, carried, make_state
from .triton_op import slot_scan


def triton_form(inputs: SlotInputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length; arguments and results as those of `chunk_form`, outputs in the dtype of `q`."""
    batch, time = inputs.q.shape[:2]
    chunk = inputs.options.chunk_size
    phase = None if state is None or chunk == 1 else state["phase"]
    buffers = {} if phase is None else state
    grid = RowGrid(batch, time, chunk, chunk, inputs.mask, phase, inputs.q.device)
    slots = {name: grid.arrange(x, buffers.get(name)) for name, x in inputs.tokens.items()}
    out, memory = slot_scan(
        grid.arrange(inputs.q),
        slots["written"],
        slots["targets"],
        tile_coefficients(buffered_gates(slots), grid.anchored, chunk),
        carried(inputs, state),
        inputs.options,
    )
    if not output_final_state:
        return grid.tokens(out), None
    rows = {name: grid.tail(x).to(memory.dtype) for name, x in slots.items()}
    return grid.tokens(out), make_state(inputs, memory, rows, grid.phase)
