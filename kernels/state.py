"""Layout of an anchored memory's recurrent state, shared by every form.

| name | shape | meaning |
|---|---|---|
| `memory_i` | `[B, H, in, out]` | layer i at the last chunk boundary, where forgetting leads to zero |
| `offset_i` | `[B, H, in, out]` | the same minus its learned start, where forgetting leads there |
| `momentum_i` | `[B, H, in, out]` | its momentum there (only with momentum) |
| `keys`, `values` | `[B, H, chunk, D]` | rows since the boundary, zero behind `phase` |
| `step`, `log_decay`, `log_momentum` | `[B, H, chunk, G]` | their gates (those in use) |
| `feature_i` | `[B, H, chunk, in]` | their inputs of layer i > 0 at the boundary's memory |
| `direction_i` | `[B, H, chunk, out]` | their descent directions there |
| `phase` | `[B]` int64 | how many rows |

Masters are float32 (float64 for float64 inputs). `feature` and `direction` follow from the rest; they are kept so that
decoding reads the weights once per token instead of once per buffered row.
"""

import torch
from torch import Tensor

from .anchored_mlp.chunk import MLPRule
from .types import Gates, Inputs, State


def rule_of(inputs: Inputs) -> MLPRule:
    """The chunk rule that the inputs ask for."""
    return MLPRule(inputs.kinds, inputs.options.activation, inputs.options.eps)


def shared_operands(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """`MLPRule`'s shared operands."""
    norm = inputs.norm
    return (*inputs.base, *((None, None) if norm is None else (norm.weight.unsqueeze(1), norm.bias.unsqueeze(1))))


def memory_name(inputs: Inputs) -> str:
    """Two names for two meanings, so that a state never passes for the other kind."""
    return "offset" if inputs.options.decay_target == "init" else "memory"


def carried(inputs: Inputs, state: State | None) -> tuple[Tensor, ...]:
    """Memory offsets and momenta at the last boundary; the learned start where there is no state."""
    batch, has_momentum = inputs.q.shape[0], inputs.gates.log_momentum is not None
    names = [f"{memory_name(inputs)}_{i}" for i in range(inputs.depth)]
    if state is not None:
        names += [f"momentum_{i}" for i in range(inputs.depth)] if has_momentum else []
        return tuple(state[name].to(inputs.precision) for name in names)
    starts = tuple(w.expand(batch, *w.shape) for w in inputs.weights)
    offsets = _zeros(starts) if inputs.options.decay_target == "init" else starts
    # Zeros of its own: torch.compile cannot trace an autograd function that is given one tensor twice.
    return offsets + _zeros(starts) if has_momentum else offsets


def _zeros(like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x) for x in like)


def check_state(inputs: Inputs, state: State) -> None:
    """Refuse a state of another batch, shape or option set.

    Raises:
        ValueError: with the name of what is missing, misshapen or of another dtype.
    """
    batch, _, heads, width = inputs.q.shape
    chunk = inputs.options.chunk_size
    expected = {"keys": (batch, heads, chunk, width), "values": (batch, heads, chunk, inputs.v.shape[-1])}
    gates = {name: gate for name, gate in inputs.gates._asdict().items() if gate is not None}
    expected |= {name: (batch, heads, chunk, gate.shape[-1]) for name, gate in gates.items()}
    prefixes = [memory_name(inputs)] + ([] if inputs.gates.log_momentum is None else ["momentum"])
    for i, weight in enumerate(inputs.weights):
        expected |= {f"{prefix}_{i}": (batch, *weight.shape) for prefix in prefixes}
        expected |= {f"feature_{i}": (batch, heads, chunk, weight.shape[1])} if i > 0 else {}
        expected |= {f"direction_{i}": (batch, heads, chunk, weight.shape[2])}
    expected |= {"phase": (batch,)}
    if odd := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"`initial_state` was made with other options: {', '.join(odd)} missing or not expected.")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"`initial_state[{name!r}]` has shape {tuple(state[name].shape)}, expected {shape}.")
    if state["phase"].dtype != torch.int64:
        raise ValueError(f"`initial_state['phase']` has dtype {state['phase'].dtype}, expected torch.int64.")


def make_state(
    inputs: Inputs, carry: tuple[Tensor, ...], keys: Tensor, values: Tensor, gates: Gates, phase: Tensor
) -> State:
    """Assemble a state from what is carried over the last boundary and the rows behind it.

    Its tensors are contiguous, so that a call of one token can overwrite them; what is carried may be views.
    """
    rule = rule_of(inputs)
    norm = rule.norm(shared_operands(inputs))
    _, features, directions = rule.write(keys, values, rule.memory(inputs.base, carry), norm)
    empty = torch.arange(keys.shape[2], device=keys.device)[None, None, :, None] >= phase[:, None, None, None]

    state = {f"{memory_name(inputs)}_{i}": d for i, d in enumerate(carry[: inputs.depth])}
    state |= {f"momentum_{i}": s for i, s in enumerate(carry[inputs.depth :])}
    state |= {"keys": keys, "values": values}
    state |= {name: gate for name, gate in gates._asdict().items() if gate is not None}
    state |= {f"feature_{i}": x.masked_fill(empty, 0) for i, x in enumerate(features) if i > 0}
    state |= {f"direction_{i}": u.masked_fill(empty, 0) for i, u in enumerate(directions)}
    return {name: x.contiguous() for name, x in state.items()} | {"phase": phase}


def buffered_gates(state: State) -> Gates:
    """Gates of the buffered rows, `[B, H, chunk, G]`."""
    return Gates(*(state.get(name) for name in Gates._fields))
