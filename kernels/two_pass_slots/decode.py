"""One token per row: gradients at the boundary's memories, both reads, fold when a chunk is complete."""

import torch
from torch import Tensor

from .. import coefficients
from ..coupling import Coupling
from ..types import Gates, State
from .inputs import SlotInputs
from .rule import SlotRule
from .state import buffered_gates, carried


def decode_form(inputs: SlotInputs, state: State) -> tuple[Tensor, State]:
    """Advance every row by one token (rows masked out stay as they are).

    Args:
        inputs: checked operands with T == 1.
        state: state to continue from.
    Returns:
        outputs `[B, 1, H, D]` in the working precision, and the state behind the token.
    """
    rule, memory = SlotRule.of(inputs.options), carried(inputs, state)
    chunk, phase = inputs.options.chunk_size, state["phase"]
    valid = torch.ones_like(phase, dtype=torch.bool) if inputs.mask is None else inputs.mask[:, 0]
    slot = ((torch.arange(chunk, device=phase.device) == phase[:, None]) & valid[:, None])[:, None, :, None]

    new = {name: x.transpose(1, 2) for name, x in inputs.tokens.items()}
    new["directions"] = _directions(rule, new, memory, state)
    rows = {name: torch.where(slot, x.to(state[name].dtype), state[name]) for name, x in new.items()}
    newest = _last_row(buffered_gates(rows), phase)
    u = rows["directions"].chunk(1 + rule.refinements, -1)[-1]
    _, out = rule.read(newest, inputs.q.transpose(1, 2), rows["written"], u, memory)
    out = out.transpose(1, 2).masked_fill(~valid[:, None, None, None], 0)

    full = valid & (phase == chunk - 1)
    # A branch on data would break a compiled graph, and costs a synchronisation off the CPU; folding every step would
    # write the whole state every step.
    if torch.compiler.is_compiling() or full.device.type != "cpu" or bool(full.any()):
        full_rows = full[:, None, None, None]
        memory = torch.where(full_rows, rule.fold(newest, rows["written"], u, memory), memory)
        rows = {name: row.masked_fill(full_rows, 0) for name, row in rows.items()}
    return out, {"memory": memory, **rows, "phase": torch.where(full, 0, phase + valid)}


def _directions(rule: SlotRule, new: State, memory: Tensor, state: State) -> Tensor:
    """Descent directions of the new token, `[B, 2 H, 1, (1 + refinements) m]`."""
    anchors, buffered = (), None
    if rule.refinements:
        before = _last_row(buffered_gates(state), state["phase"])
        anchors = (before.beta, None, before.grad)
        buffered = (state["written"], state["directions"].chunk(1 + rule.refinements, -1))
    return torch.cat(rule.write(new["written"], new["targets"], memory, anchors, buffered)[1], -1)


def _last_row(gates: Gates, phase: Tensor) -> Coupling:
    """Coefficients of the newest of the buffered rows `[B, 2 H, chunk, 1]`."""
    rows = (None if gate is None else gate.mT for gate in gates)
    return Coupling.from_coefficients(coefficients.last_row(*rows, phase), None, "head")
