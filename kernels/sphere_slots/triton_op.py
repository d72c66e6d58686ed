"""The Triton form: one program per row and head walks its tokens with the slots in registers."""

import torch
from torch import Tensor

from ..launch import differentiable_op, launch
from ..types import Gates, State
from .plan import LARGEST_STATE, SEGMENT, plan
from .triton_scan import backward_kernel, forward_kernel
from .types import SphereInputs, carried, make_state


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(inputs: SphereInputs) -> str | None:
    """Why the kernels cannot compute a call, as the end of a sentence; `None` if they can."""
    if inputs.q.dtype not in DTYPES:
        return f"not for {inputs.q.dtype}"
    cut = plan(*inputs.slots.shape[1:])
    if cut.slots * cut.width > LARGEST_STATE:
        number, width = inputs.slots.shape[1:]
        return f"for up to {LARGEST_STATE} numbers of slots times width, not for {number} slots of width {width}"
    return None


def _constants(slots: Tensor, step: Tensor, objective: str, normalization: str, chunk_size: int) -> dict:
    number, width = slots.shape[-2:]
    cut = plan(number, width)
    return {
        "M": number, "D": width, "MB": cut.slots, "DB": cut.width, "STEPS": step.shape[-1],
        "OBJECTIVE": objective, "NORMALIZATION": normalization, "CHUNK": chunk_size, "SEGMENT": SEGMENT,
        "num_warps": cut.warps, "num_stages": 1,
    }  # fmt: skip


def _scan(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_decay: Tensor | None, phases: Tensor,
    start: Tensor, slots: Tensor, objective: str, normalization: str, chunk_size: int, kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_tokens, heads = q.shape[:3]
    out, start_out, slots_out = torch.empty_like(v), torch.empty_like(start), torch.empty_like(slots)
    launch(
        forward_kernel, batch * heads, q, k, v, step, log_decay, phases, start, slots, out, start_out, slots_out, kept,
        num_tokens, heads, **_constants(slots, step, objective, normalization, chunk_size),
    )  # fmt: skip
    return out, start_out, slots_out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_decay: Tensor | None, phases: Tensor,
    start: Tensor, slots: Tensor, objective: str, normalization: str, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _scan(q, k, v, step, log_decay, phases, start, slots, objective, normalization, chunk_size, None)


def _backward(
    cot_out: Tensor, cot_start: Tensor, cot_slots: Tensor,
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_decay: Tensor | None, phases: Tensor,
    start: Tensor, slots: Tensor, objective: str, normalization: str, chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    batch, num_tokens, heads = q.shape[:3]
    options = (objective, normalization, chunk_size)
    kept = slots.new_empty(batch, heads, -(-num_tokens // SEGMENT), 2, *slots.shape[2:])
    _scan(q, k, v, step, log_decay, phases, start, slots, *options, kept)
    replayed = slots.new_empty(batch, heads, SEGMENT, 2, *slots.shape[2:])
    gradients = [torch.zeros_like(x) for x in (q, k, v, step)]
    cot_decay = step.new_empty(0) if log_decay is None else torch.zeros_like(log_decay)
    before = [torch.empty_like(x) for x in (start, slots)]
    launch(
        backward_kernel, batch * heads, q, k, v, step, log_decay, phases, kept, replayed,
        cot_out.contiguous(), cot_start.contiguous(), cot_slots.contiguous(), *gradients, cot_decay, *before,
        num_tokens, heads, **_constants(slots, step, *options),
    )  # fmt: skip
    return [*gradients, cot_decay, *before]


def _save(inputs: tuple, outputs: tuple) -> tuple[list[Tensor | None], list]:
    return list(inputs[:8]), list(inputs[8:])


def _spread(gradients: tuple[Tensor, ...], numbers: list) -> tuple[Tensor | None, ...]:
    q, k, v, step, decay, start, slots = gradients
    return q, k, v, step, decay if decay.numel() else None, None, start, slots, None, None, None


_op = differentiable_op("sphere_slots", _forward, _backward, _save, _spread)


def phases_of(mask: Tensor | None, phase: Tensor, time: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """How many tokens of its chunk stand in front of each token.

    Args:
        mask: `[B, T]` valid tokens.
        phase: `[B]` int64, tokens of the chunk that were read before.
        time: number of tokens.
        chunk_size: grid.

    Returns:
        `[B, T]` int32, -1 where a token is padded; and the phase behind the last one.
    """
    valid = phase.new_ones(phase.shape[0], time, dtype=torch.bool) if mask is None else mask
    seen = phase[:, None] + valid.cumsum(1)
    phases = torch.where(valid, (seen - 1) % chunk_size, -1).to(torch.int32)
    return phases.contiguous(), seen[:, -1] % chunk_size


def triton_form(inputs: SphereInputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length; arguments and results as `chunk.chunk_form`, outputs in the dtype of q, k and v."""
    options, (batch, time) = inputs.options, inputs.q.shape[:2]
    start, slots = (x.contiguous() for x in carried(inputs, state))
    phase = torch.zeros(batch, dtype=torch.long, device=slots.device)
    phase = phase if state is None else state.get("phase", phase)
    phases, phase = phases_of(inputs.mask, phase, time, options.chunk_size)
    gates = Gates(*(None if gate is None else gate.contiguous() for gate in inputs.gates))
    operands = (
        *(x.contiguous() for x in inputs[:3]), gates.step, gates.log_decay, phases, start, slots,
        options.objective, options.normalization, options.chunk_size,
    )  # fmt: skip
    run = _op if torch.is_grad_enabled() or torch.compiler.is_compiling() else _forward
    out, start, slots = run(*operands)
    return out, make_state(options, start, slots, phase) if output_final_state else None
