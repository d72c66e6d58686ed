"""The truth: one token at a time, gradients by autograd of the stated loss. For tests; any float dtype, no speed."""

import torch
from torch import Tensor

from ..types import State
from .types import SphereInputs, SphereOptions, carried, make_state, normalise


def inner_loss(phi: Tensor, k: Tensor, v: Tensor, objective: str) -> Tensor:
    """Loss of one token summed over rows and heads (lattice c.1); `phi [B, H, M, D]`, the slots as rows."""
    if objective == "enc":
        return 0.5 * (torch.einsum("bhmd,bhd->bhm", phi, k) - v).square().sum()
    decoded = torch.einsum("bhm,bhmd->bhd", k, phi)
    return 0.5 * (decoded - v).square().sum() if objective == "dec" else -(decoded * v).sum()


def descent(start: Tensor, k: Tensor, v: Tensor, step: Tensor, options: SphereOptions) -> tuple[Tensor, Tensor]:
    """Steps down the loss at `start [B, H, M, D]`.

    Returns:
        the step of every slot, through the normalisation; and how much of the slot the same step takes away, which is
        its part along the slot before the projection, `[..., 1]`.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        start = start.clone() if create_graph and start.requires_grad else start.detach().requires_grad_()
        phi = start.clone() if options.normalization == "none" else normalise(start)
        loss = inner_loss(phi, k, v, options.objective)
        along_phi, along_start = torch.autograd.grad(loss, (phi, start), create_graph=create_graph)
        taken = torch.zeros_like(step)
        if options.normalization != "none":
            taken = -step * (phi * along_phi).sum(-1, keepdim=True) / start.square().sum(-1, keepdim=True)
    return -step * along_start, taken


def advance(start: Tensor, slots: Tensor, k: Tensor, v: Tensor, gates: tuple, options: SphereOptions) -> Tensor:
    """Running slots after one token (README.md); `gates` are step and decay factor, `[B, H, M or 1, 1]` each."""
    step, keep = gates
    moved, taken = descent(start, k, v, step, options)
    taken = taken.clamp(min=-1 / options.chunk_size).minimum(keep)
    new = keep * slots + moved - taken * (slots - start)
    return new / (start + moved).norm(dim=-1, keepdim=True) if options.normalization == "retract" else new


def read(slots: Tensor, q: Tensor, options: SphereOptions) -> Tensor:
    """Answer to a query `[B, H, .]` from the running slots."""
    phi = normalise(slots) if options.normalization == "lazy" else slots
    return torch.einsum("bhmd,bhd->bhm" if options.objective == "enc" else "bhmd,bhm->bhd", phi, q)


def reference_form(inputs: SphereInputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call token by token; arguments and results as `kernels.sphere_slots.chunk.chunk_form`."""
    q, k, v, gates, _, mask, options = inputs
    batch, time = q.shape[:2]
    start, slots = carried(inputs, state)
    phase = torch.zeros(batch, dtype=torch.long, device=q.device)
    if state is not None and options.chunk_size > 1:
        phase = state["phase"]
    outputs = []
    for t in range(time):
        valid = torch.ones_like(phase, dtype=torch.bool) if mask is None else mask[:, t]
        is_row = valid[:, None, None, None]
        keep = q.new_ones(()) if gates.log_decay is None else gates.log_decay[:, t, :, :, None].exp()
        new = advance(start, slots, k[:, t], v[:, t], (gates.step[:, t, :, :, None], keep), options)
        slots = torch.where(is_row, new, slots)
        outputs.append(read(slots, q[:, t], options).masked_fill(~valid[:, None, None], 0))
        phase = phase + valid
        is_full = (phase == options.chunk_size)[:, None, None, None]
        boundary = normalise(slots) if options.normalization == "retract" else slots
        start, slots = torch.where(is_full, boundary, start), torch.where(is_full, boundary, slots)
        phase = torch.where(phase == options.chunk_size, 0, phase)
    return torch.stack(outputs, 1), make_state(options, start, slots, phase) if output_final_state else None
