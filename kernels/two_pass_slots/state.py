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
from .inputs import SlotInputs
from .rule import SlotRule, earlier_rows


def carried(inputs: SlotInputs, state: State | None) -> Tensor:
    """The memories at the last boundary; the learned start, or zeros, where there is no state."""
    if state is not None:
        return state["memory"].to(inputs.precision)
    batch, _, heads, width = inputs.q.shape
    if inputs.start is not None:
        return inputs.start.expand(batch, *inputs.start.shape)
    return inputs.q.new_zeros(batch, 2 * heads, inputs.targets.shape[-1], width, dtype=inputs.precision)


def check_state(inputs: SlotInputs, state: State) -> None:
    """Refuse a state of another batch, shape or option set.

    Raises:
        ValueError: with the name of what is missing or misshapen.
    """
    batch, _, heads, width = inputs.q.shape
    slots, chunk = inputs.targets.shape[-1], inputs.options.chunk_size
    expected = {name: (batch, x.shape[2], chunk, x.shape[3]) for name, x in inputs.tokens.items()}
    expected["memory"] = (batch, 2 * heads, slots, width)
    expected["directions"] = (batch, 2 * heads, chunk, (1 + inputs.options.refinements) * slots)
    expected["phase"] = (batch,)
    if odd := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"`initial_state` was made with other options: {', '.join(odd)} missing or not expected.")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"`initial_state[{name!r}]` has shape {tuple(state[name].shape)}, expected {shape}.")


def make_state(inputs: SlotInputs, memory: Tensor, rows: dict[str, Tensor], phase: Tensor) -> State:
    """Assemble a state.

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
    return {"memory": memory, **rows, "directions": torch.cat(directions, -1).masked_fill(empty, 0), "phase": phase}


def buffered_gates(rows: State) -> Gates:
    """Gates of the buffered rows, `[B, 2 H, chunk, 1]`."""
    return Gates(*(rows.get(name) for name in Gates._fields))
