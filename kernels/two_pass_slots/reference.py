"""The truth: one token at a time, gradients by autograd of the stated loss. For tests; any float dtype, no speed."""

import torch
from torch import Tensor
from torch.nn import functional

from ..types import State
from .inputs import SlotInputs
from .state import carried, make_state


def apply_map(name: str, z: Tensor, eps: float) -> Tensor:
    """φ or f over the slots (trellis c.3)."""
    if name in ("identity", "softmax"):
        return z if name == "identity" else z.softmax(-1)
    s = functional.silu(z)
    if name == "l2_silu":
        return s / (s.square().sum(-1, keepdim=True) + eps).sqrt()
    return functional.layer_norm(s, s.shape[-1:], eps=eps) if name == "ln_silu" else s


def inner_gradient(w: Tensor, target: Tensor, memory: Tensor, inputs: SlotInputs) -> Tensor:
    """Gradient of ½‖φ(S w) - α‖² in S (trellis c.1), for every row and head: of a change ΔS, at ΔS = 0."""
    options, differentiable = inputs.options, torch.is_grad_enabled()
    with torch.enable_grad():
        change = torch.zeros_like(memory).requires_grad_()
        point = torch.einsum("bhmd,bhd->bhm", memory, w)
        point = options.hypergrad * point + (1 - options.hypergrad) * point.detach()
        point = point + torch.einsum("bhmd,bhd->bhm", change, w)
        loss = 0.5 * (apply_map(options.write_map, point, options.write_eps) - target).square().sum()
        return torch.autograd.grad(loss, change, create_graph=differentiable)[0]


def read(q: Tensor, memory: Tensor, inputs: SlotInputs) -> Tensor:
    """y = Vᵀ f(K q) (trellis c.2)."""
    keys, values = memory.chunk(2, 1)
    found = torch.einsum("bhmd,bhd->bhm", keys, q)
    weights = apply_map(inputs.options.read_map, found, inputs.options.read_eps)
    return torch.einsum("bhmd,bhm->bhd", values, weights)


def reference_form(inputs: SlotInputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call token by token; arguments and results as those of `chunk_form`.

    Level 0 of the memories stands still until the end of a chunk; level i + 1 makes the steps whose gradients are
    taken at level i. The last level is the one that is read.
    """
    batch, time, chunk = *inputs.q.shape[:2], inputs.options.chunk_size
    q, tokens, device = inputs.q, inputs.tokens, inputs.q.device
    mask = torch.ones(batch, time, dtype=torch.bool, device=device) if inputs.mask is None else inputs.mask
    skip = 0
    if state is not None:  # replay the rows since the last boundary
        skip = chunk
        mask = torch.cat([torch.arange(chunk, device=device) < state["phase"][:, None], mask], 1)
        q = torch.cat([q.new_zeros(batch, chunk, *q.shape[2:]), q], 1)
        tokens = {name: torch.cat([state[name].transpose(1, 2), x], 1) for name, x in tokens.items()}

    levels = [carried(inputs, state)] * (2 + inputs.options.refinements)
    phase, outputs = torch.zeros(batch, dtype=torch.long, device=device), []
    for t in range(mask.shape[1]):
        valid = mask[:, t, None, None, None]
        now = {name: x[:, t] for name, x in tokens.items()}
        target = now["targets"].repeat(1, 2, 1)
        keep = now["log_decay"].exp().unsqueeze(-1) if "log_decay" in now else 1.0
        grads = [inner_gradient(now["written"], target, level, inputs) for level in levels[:-1]]
        moved = [keep * level - now["step"].unsqueeze(-1) * grad for level, grad in zip(levels[1:], grads)]
        levels[1:] = [torch.where(valid, new, old) for new, old in zip(moved, levels[1:])]
        outputs.append(read(q[:, t], levels[-1], inputs).masked_fill(~mask[:, t, None, None], 0))
        phase = phase + mask[:, t]
        full = (phase == chunk)[:, None, None, None]
        phase = torch.where(phase == chunk, 0, phase)
        levels = [torch.where(full, levels[-1], level) for level in levels]

    final = None
    if output_final_state:
        # The last `phase` valid tokens of each row, in order.
        order = torch.where(mask, mask.cumsum(1) - 1 - mask.sum(1, keepdim=True) + phase[:, None], -1)
        slots = torch.arange(chunk, device=device)
        index = (order[:, None] == slots[:, None]).int().argmax(-1)[:, :, None, None]
        empty = (slots >= phase[:, None])[:, :, None, None]
        rows = {name: x.gather(1, index.expand(-1, -1, *x.shape[2:])) for name, x in tokens.items()}
        rows = {name: x.masked_fill(empty, 0).transpose(1, 2) for name, x in rows.items()}
        final = make_state(inputs, levels[0], rows, phase)
    return torch.stack(outputs[skip:], 1), final
