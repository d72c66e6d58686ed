"""One token per row: coefficients at the chunk's start, update of the running slots, and a read."""

import torch
from torch import Tensor

from ..types import State
from .chunk import SphereRule
from .types import SphereInputs, carried, make_state, normalise


def decode_form(inputs: SphereInputs, state: State) -> tuple[Tensor, State]:
    """Advance every row by one token (rows masked out stay as they are).

    Args:
        inputs: checked operands with T == 1.
        state: state to continue from.
    Returns:
        outputs `[B, 1, H, .]` in the working precision, and the state behind the token.
    """
    options, rule = inputs.options, SphereRule(inputs.options)
    start, slots = carried(inputs, state)
    q, k, v, step = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v, inputs.gates.step))
    decay = inputs.gates.log_decay
    keep = None if decay is None else decay.transpose(1, 2).exp()
    phase = state.get("phase", torch.zeros(slots.shape[0], dtype=torch.long, device=slots.device))
    valid = torch.ones_like(phase, dtype=torch.bool) if inputs.mask is None else inputs.mask[:, 0]

    c = rule.coefficients(k, v, step, keep, start)
    new = c.keep * slots + c.write * c.h
    new = new if c.pull is None else new + c.pull * start
    new = torch.where(valid[:, None, None, None], new, slots)
    phi = normalise(new) if options.normalization == "lazy" else new
    out = q @ (phi.mT if options.objective == "enc" else phi)
    out = out.transpose(1, 2).masked_fill(~valid[:, None, None, None], 0)

    phase = phase + valid
    full = valid & (phase == options.chunk_size)
    start, slots = rule.boundary(start, new, full.to(new.dtype)[:, None, None, None])
    return out, make_state(options, start, slots, torch.where(full, 0, phase))
