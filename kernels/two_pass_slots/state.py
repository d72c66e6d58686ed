"""Layout of the recurrent state, shared by every form.

| name | shape | meaning |
|---|---|---|
| `memory` | `[B, 2 H, m, D]` | memories of keys, then those of values, at the last chunk boundary |
| `written` | `[B, 2 H, chunk, D]` | keys and values since the boundary, zero behind `phase` |
| `targets` | `[B, H, chunk, m]` | their target codes |
| `step`, `log_decay` | `[B, 2 H, chunk, 1]` | their gates (those in use) |
| `directions` | `[B, 2 H, chunk, (1 + refinements) m]` | their descent directions |
| `phase` | `[B]` int64 | how many rows |

Masters are float32 (float64 for float64 inputs). The directions follow from the rest; they are kept so that decoding
reads the memories once per token instead of once per buffered row.
"""

import torch
from torch import Tensor

from ..types import Gates, State
from .inputs import SlotInputs, SlotOperands
from .rule import SlotRule, earlier_rows


def carried(inputs: SlotInputs, state: State | None) -> Tensor:
    """The memories at the last boundary; the learned start, or zeros, where there is no state."""
    if state is not None:
        return state["memory"].to(inputs.precision)
    batch, _, heads, width = inputs.q.shape
    if inputs.start is not None:
        return inputs.start.expand(batch, *inputs.start.shape)
    return inputs.q.new_zeros(batch, 2 * heads, inputs.targets.shape[-1], width, dtype=inputs.precision)


def check_state(operands: SlotOperands, state: State) -> None:
    """Refuse a state of another batch, shape or option set.

    Raises:
        ValueError: with the name of what is missing, misshapen or of another dtype.
    """
    batch, _, heads, slots = operands.targets.shape
    chunk = operands.options.chunk_size
    expected = {
        "memory": (batch, 2 * heads, slots, operands.width),
        "written": (batch, 2 * heads, chunk, operands.width),
        "targets": (batch, heads, chunk, slots),
        "directions": (batch, 2 * heads, chunk, (1 + operands.options.refinements) * slots),
        "phase": (batch,),
    }
    gates = operands.gates._asdict()
    expected |= {name: (batch, 2 * heads, chunk, 1) for name, gate in gates.items() if gate is not None}
    if odd := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"`initial_state` was made with other options: {', '.join(odd)} missing or not expected.")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"`initial_state[{name!r}]` has shape {tuple(state[name].shape)}, expected {shape}.")
    if state["phase"].dtype != torch.int64:
        raise ValueError(f"`initial_state['phase']` has dtype {state['phase'].dtype}, expected torch.int64.")


def make_state(inputs: SlotInputs, memory: Tensor, rows: dict[str, Tensor], phase: Tensor) -> State:
    """Assemble a state, of contiguous tensors, so that a call of one token can overwrite them.

    Args:
        inputs: checked operands of the call.
        memory: `[B, 2 H, m, D]` at the last boundary.
        rows: those since the boundary, `[B, heads, chunk, *]` by name, zero behind `phase`.
        phase: `[B]`.
    """
    rule = SlotRule.of(inputs.options)
    anchors = earlier_rows(buffered_gates(rows)) if rule.refinements else ()
    _, directions = rule.write(rows["written"], rows["targets"], memory, anchors)
    empty = torch.arange(inputs.options.chunk_size, device=phase.device)[:, None] >= phase[:, None, None, None]
    state = {"memory": memory, **rows, "directions": torch.cat(directions, -1).masked_fill(empty, 0)}
    return {name: x.contiguous() for name, x in state.items()} | {"phase": phase}


def buffered_gates(rows: State) -> Gates:
    """Gates of the buffered rows, `[B, 2 H, chunk, 1]`."""
    return Gates(*(rows.get(name) for name in Gates._fields))
