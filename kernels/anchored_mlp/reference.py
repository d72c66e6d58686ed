"""The truth: one token at a time, gradients by autograd of the stated loss. For tests; any float dtype, no speed."""

import torch
from torch import Tensor
from torch.nn import functional

from ..state import buffered_gates, carried, make_state
from ..types import Gates, Inputs, State


def memory(x: Tensor, weights: list[Tensor], inputs: Inputs) -> Tensor:
    """M(x) for `x [B, H, D]` and weights `[B, H, in, out]` (titans c2)."""
    act = {"gelu": functional.gelu, "gelu_pytorch_tanh": lambda z: functional.gelu(z, approximate="tanh")}
    act = act.get(inputs.options.activation, functional.silu)
    z = x
    for i, weight in enumerate(weights):
        z = torch.einsum("bhi,bhio->bho", z if i == 0 else act(z), weight)
    if inputs.norm is None:
        return z
    mean, var = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, unbiased=False)
    return x + (z - mean) / (var + inputs.options.eps).sqrt() * inputs.norm.weight + inputs.norm.bias


def inner_gradient(k: Tensor, v: Tensor, weights: list[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradient of ½‖M(k) - v‖² for every row and head."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        weights = [w.clone() if differentiable and w.requires_grad else w.detach().requires_grad_() for w in weights]
        loss = 0.5 * (memory(k, weights, inputs) - v).square().sum()
        return torch.autograd.grad(loss, weights, create_graph=differentiable)


def _side(gate: Tensor | None, kind: str, default: float) -> Tensor | float:
    """Gate of one layer `[B, H, c]` shaped to multiply its matrix."""
    if gate is None:
        return default
    return gate.unsqueeze(-1) if kind != "out" else gate.unsqueeze(-2)


def _where(mask: Tensor, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    return [torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old)]


def reference_form(inputs: Inputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call token by token; arguments and results as `kernels.prefill.chunk_form`."""
    batch, time, chunk, depth = *inputs.q.shape[:2], inputs.options.chunk_size, inputs.depth
    q, k, v, gates = inputs.q, inputs.k, inputs.v, inputs.gates
    mask = torch.ones(batch, time, dtype=torch.bool, device=q.device) if inputs.mask is None else inputs.mask
    skip = 0
    if state is not None:  # replay the rows since the last boundary
        skip = chunk
        rows, kept = buffered_gates(state), torch.arange(chunk, device=q.device) < state["phase"][:, None]
        mask = torch.cat([kept, mask], 1)
        q = torch.cat([torch.zeros_like(state["keys"]).transpose(1, 2), q], 1)
        k, v = (torch.cat([state[n].transpose(1, 2), x], 1) for n, x in (("keys", k), ("values", v)))
        gates = Gates(*(x if x is None else torch.cat([r.transpose(1, 2), x], 1) for r, x in zip(rows, gates)))

    base = [0.0 if b is None else b for b in inputs.base]
    offsets = list(carried(inputs, state))
    momenta = offsets[depth:] or [torch.zeros_like(d) for d in offsets]
    offsets = offsets[:depth]
    anchor, anchor_momenta, phase = offsets, momenta, torch.zeros(batch, dtype=torch.long, device=q.device)
    outputs, placed = [], []
    for t in range(mask.shape[1]):
        valid = mask[:, t]
        step, log_decay, log_momentum = (
            [None if g is None else g[:, t] for g in inputs.gate_sets(gate)] for gate in gates
        )
        keep = [_side(None if g is None else g.exp(), kind, 1.0) for g, kind in zip(log_decay, inputs.kinds)]
        at = [a * d if inputs.options.decay_before_grad else d for a, d in zip(keep, anchor)]
        grads = inner_gradient(k[:, t], v[:, t], [b + d for b, d in zip(base, at)], inputs)
        eta = [_side(None if g is None else g.exp(), kind, 0.0) for g, kind in zip(log_momentum, inputs.kinds)]
        theta = [_side(g, kind, 0.0) for g, kind in zip(step, inputs.kinds)]
        moved = [e * s - th * g for e, s, th, g in zip(eta, momenta, theta, grads)]
        momenta = _where(valid, moved, momenta)
        offsets = _where(valid, [a * d + s for a, d, s in zip(keep, offsets, moved)], offsets)
        out = memory(q[:, t], [b + d for b, d in zip(base, offsets)], inputs)
        outputs.append(out.masked_fill(~valid[:, None, None], 0))
        placed.append(phase)
        phase = phase + valid
        full = phase == chunk
        phase = torch.where(full, 0, phase)
        anchor, anchor_momenta = _where(full, offsets, anchor), _where(full, momenta, anchor_momenta)

    final = None
    if output_final_state:
        carry = (*anchor, *(anchor_momenta if inputs.gates.log_momentum is not None else ()))
        # The last `phase` valid tokens of each row, in order.
        order = torch.where(mask, mask.cumsum(1) - 1 - mask.sum(1, keepdim=True) + phase[:, None], -1)
        slots = torch.arange(chunk, device=q.device)
        index = (order[:, None] == slots[:, None]).int().argmax(-1)
        empty = (slots >= phase[:, None])[:, :, None, None]

        def tail(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            rows = x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))
            return rows.masked_fill(empty, 0).transpose(1, 2)

        k, v, *rows = (tail(x) for x in (k, v, *gates))
        final = make_state(inputs, carry, k, v, Gates(*rows), phase)
    return torch.stack(outputs[skip:], 1), final
