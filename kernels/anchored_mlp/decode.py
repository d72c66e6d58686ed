"""One token per row: gradient at the boundary's memory, read of the running memory, fold when a chunk is complete."""

import torch
from torch import Tensor

from .. import coefficients, inner
from ..coupling import Coupling
from ..state import buffered_gates, carried, memory_name, rule_of, shared_operands
from ..types import Gates, Inputs, State


def _put(buffer: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """Write `row [B, H, 1, D]` where `slot [B, 1, chunk, 1]` is true."""
    return torch.where(slot, row.to(buffer.dtype), buffer)


def decode_form(inputs: Inputs, state: State) -> tuple[Tensor, State]:
    """Advance every row by one token (rows masked out stay as they are).

    Args:
        inputs: checked operands with T == 1.
        state: state to continue from.
    Returns:
        outputs `[B, 1, H, V]` in the working precision, and the state behind the token.
    """
    rule, shared = rule_of(inputs), shared_operands(inputs)
    norm, carry = rule.norm(shared), carried(inputs, state)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    chunk, phase = inputs.options.chunk_size, state["phase"]
    slots = torch.arange(chunk, device=phase.device)
    valid = torch.ones_like(phase, dtype=torch.bool) if inputs.mask is None else inputs.mask[:, 0]
    slot = ((slots == phase[:, None]) & valid[:, None])[:, None, :, None]

    at = rule.memory(shared, carry)
    if inputs.options.decay_before_grad and inputs.gates.log_decay is not None:
        at = [carry[0] * inputs.gates.log_decay.exp().transpose(1, 2)]
        at = [at[0] if shared[0] is None else at[0] + shared[0]]
    _, features, directions = rule.write(k, v, at, norm)
    new = {name: gate.transpose(1, 2) for name, gate in inputs.gates._asdict().items() if gate is not None}
    new |= {"keys": k, "values": v}
    new |= {f"feature_{i}": x for i, x in enumerate(features) if i > 0}
    new |= {f"direction_{i}": u for i, u in enumerate(directions)}
    rows = {name: _put(state[name], row, slot) for name, row in new.items()}

    couplings = _couplings(inputs, buffered_gates(rows), phase)
    x = [rows["keys"], *(rows[f"feature_{i}"] for i in range(1, inputs.depth))]
    u = [rows[f"direction_{i}"] for i in range(inputs.depth)]
    _, r = rule.read(q, couplings, x, u, shared, carry)
    out = inner.output(q, r[-1], norm, inputs.options.eps).transpose(1, 2)
    out = out.masked_fill(~valid[:, None, None, None], 0)

    full = valid & (phase == chunk - 1)
    # A branch on data would break a compiled graph, and costs a synchronisation off the CPU; folding every step would
    # write the whole state every step.
    if torch.compiler.is_compiling() or full.device.type != "cpu" or bool(full.any()):
        full_rows = full[:, None, None, None]
        carry = tuple(
            torch.where(full_rows, after, before) for after, before in zip(rule.fold(couplings, x, u, carry), carry)
        )
        rows = {name: row.masked_fill(full_rows, 0) for name, row in rows.items()}
    after = {f"{memory_name(inputs)}_{i}": d for i, d in enumerate(carry[: inputs.depth])}
    after |= {f"momentum_{i}": s for i, s in enumerate(carry[inputs.depth :])}
    return out, {**after, **rows, "phase": torch.where(full, 0, phase + valid)}


def _couplings(inputs: Inputs, gates: Gates, phase: Tensor) -> list[Coupling]:
    """Coefficients of the newest row, from the gates of the buffered rows `[B, H, chunk, G]`."""
    rows = (None if gate is None else gate.mT for gate in gates)
    layers = coefficients.last_row(*rows, phase).layers(inputs.depth)
    return [Coupling.from_coefficients(c, None, kind) for c, kind in zip(layers, inputs.kinds)]
