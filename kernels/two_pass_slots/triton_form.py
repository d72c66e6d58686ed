"""The Triton form: rows on the grid, coefficients of all chunks, then kernels that walk the slots as they lie."""

import torch
from torch import Tensor

from ..coefficients_triton import tile_coefficients
from ..grid import RowGrid
from ..types import State
from .inputs import SlotInputs
from .plan import WIDEST_CHUNK, WIDEST_MEMORY
from .state import buffered_gates, carried, make_state
from .triton_op import slot_scan


def unsupported(inputs: SlotInputs) -> str | None:
    """Why the kernels cannot compute a call, as the end of a sentence; `None` if they can."""
    options, slots, width = inputs.options, inputs.targets.shape[-1], inputs.q.shape[-1]
    if inputs.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"not for {inputs.q.dtype}"
    if options.write_map == "identity":
        return "not for write_map='identity'"
    if options.refinements:
        return "not for refinements"
    widest = WIDEST_MEMORY[inputs.q.element_size()]
    if max(slots, width) > widest:
        return (
            f"for up to {widest} slots of width {widest} in {inputs.q.dtype}, not for {slots} slots of width {width}"
        )
    if options.chunk_size > WIDEST_CHUNK:
        return f"for chunks of up to {WIDEST_CHUNK} tokens, not for chunk_size={options.chunk_size}"
    return None


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
