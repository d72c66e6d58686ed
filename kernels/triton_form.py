"""The Triton form: rows on the grid, coefficients of all tiles, then kernels that walk the slots as they lie."""

import torch
from torch import Tensor

from .anchored_linear.plan import WIDEST_STATE, WIDEST_TILE, tile_width
from .anchored_linear.triton_op import linear_scan
from .anchored_mlp import plan as mlp_plan
from .anchored_mlp.triton_op import mlp_scan
from .coefficients_triton import tile_coefficients
from .launch import is_interpreted
from .prefill import Slots, uses_solve
from .state import carried
from .types import Inputs, State


PROVEN_TILE = 16
"""Chunks of deep and LayerNorm memories that an H100 computed right in every precision (triton 3.6).

At 64 tokens two cases failed there, and nobody knows yet why: a memory of two layers in bfloat16 gave garbage, and the
backward of one layer behind a LayerNorm in float32 read beyond its memory (kernels/anchored_mlp/README.md).
"""


def unsupported(inputs: Inputs) -> str | None:
    """Why the kernels cannot compute a call, as the end of a sentence; `None` if they can."""
    width, value_width, chunk = inputs.q.shape[-1], inputs.v.shape[-1], inputs.options.chunk_size
    if inputs.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"not for {inputs.q.dtype}"
    if inputs.kinds[0] != "head":
        return "not for gates per channel"
    if not uses_solve(inputs):
        if inputs.depth == 1 and inputs.q.dtype == torch.float32 and chunk > PROVEN_TILE:
            return f"for chunks of up to {PROVEN_TILE} tokens behind a LayerNorm in float32, not for {chunk}"
        return mlp_plan.unsupported(inputs.depth, width, value_width, chunk, inputs.norm is not None)
    if max(width, value_width) > WIDEST_STATE:
        return f"up to a width of {WIDEST_STATE}, not for {max(width, value_width)}"
    if tile_width(chunk, inputs.q.element_size()) is None:
        widest = WIDEST_TILE[inputs.q.element_size()]
        return f"for chunks that divide into tiles of 16 to {widest} tokens, not for chunk_size={chunk}"
    if inputs.options.decay_before_grad and inputs.gates.log_momentum is not None:
        return "not for decay_before_grad with momentum"
    return None


def triton_form(inputs: Inputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length; arguments and results as `kernels.prefill.chunk_form`, outputs in the dtype of `v`."""
    chunk = inputs.options.chunk_size
    in_float32 = not uses_solve(inputs) and inputs.depth > 1 and chunk > PROVEN_TILE
    # The interpreter multiplies bit patterns of bfloat16.
    if in_float32 or is_interpreted() and inputs.q.dtype == torch.bfloat16:
        inputs = inputs.upcast()
    slots = Slots.of(inputs, state, lambda buffered: chunk)
    scan = _linear if uses_solve(inputs) else _mlp
    out, carry = scan(inputs, slots, carried(inputs, state))
    return slots.grid.tokens(out), slots.state(inputs, carry) if output_final_state else None


def _linear(inputs: Inputs, slots: Slots, carry: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    chunk, anchored = inputs.options.chunk_size, slots.grid.anchored
    tile = tile_width(chunk, inputs.q.element_size())
    # A chunk of several tiles folds all its tokens, so that its later tiles find them.
    counted = anchored if chunk <= tile else torch.full_like(anchored, slots.q.shape[1])
    coefficients = tile_coefficients(slots.gates, counted, tile)
    at_decayed = inputs.options.decay_before_grad and inputs.gates.log_decay is not None
    return linear_scan(*slots[1:4], coefficients, inputs.base[0], carry, anchored, chunk, at_decayed)


def _mlp(inputs: Inputs, slots: Slots, carry: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    options = inputs.options
    coefficients = tile_coefficients(slots.gates, slots.grid.anchored, options.chunk_size)
    base = None if options.decay_target == "zero" else inputs.weights
    return mlp_scan(
        *slots[1:4],
        coefficients,
        base,
        inputs.norm,
        carry,
        activation=options.activation,
        eps=options.eps,
        tile=options.chunk_size,
    )
