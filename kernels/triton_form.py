"""The Triton form: rows on the grid, coefficients of all tiles, then kernels that walk the slots as they lie."""

import torch
from torch import Tensor

from .anchored_linear.plan import WIDEST_STATE, WIDEST_TILE, tile_width
from .anchored_linear.triton_op import linear_scan
from .coefficients_triton import tile_coefficients
from .launch import is_interpreted
from .prefill import Slots, uses_solve
from .state import carried
from .types import Inputs, State


def unsupported(inputs: Inputs) -> str | None:
    """Why the kernels cannot compute a call, as the end of a sentence; `None` if they can."""
    options, widths = inputs.options, [max(w.shape[1:]) for w in inputs.weights]
    if inputs.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"not for {inputs.q.dtype}"
    if inputs.kinds[0] != "head":
        return "not for gates per channel"
    if not uses_solve(inputs):
        return "not for a memory behind a LayerNorm"
    if max(widths) > WIDEST_STATE:
        return f"up to a width of {WIDEST_STATE}, not for {max(widths)}"
    if tile_width(options.chunk_size, inputs.q.element_size()) is None:
        widest = WIDEST_TILE[inputs.q.element_size()]
        return f"for chunks that divide into tiles of 16 to {widest} tokens, not for chunk_size={options.chunk_size}"
    if options.decay_before_grad and inputs.gates.log_momentum is not None:
        return "not for decay_before_grad with momentum"
    return None


def triton_form(inputs: Inputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length; arguments and results as `kernels.prefill.chunk_form`, outputs in the dtype of `v`."""
    if is_interpreted() and inputs.q.dtype == torch.bfloat16:
        # The interpreter multiplies bit patterns of bfloat16.
        inputs = inputs.upcast()
    chunk = inputs.options.chunk_size
    slots = Slots.of(inputs, state, lambda buffered: chunk)
    grid = slots.grid
    tile = tile_width(chunk, inputs.q.element_size())
    # A chunk of several tiles folds all its tokens, so that its later tiles find them.
    counted = grid.anchored if chunk <= tile else torch.full_like(grid.anchored, slots.q.shape[1])
    out, carry = linear_scan(
        *slots[1:4],
        tile_coefficients(slots.gates, counted, tile),
        inputs.base[0],
        carried(inputs, state),
        grid.anchored,
        chunk,
        inputs.options.decay_before_grad and inputs.gates.log_decay is not None,
    )
    return grid.tokens(out), slots.state(inputs, carry) if output_final_state else None
