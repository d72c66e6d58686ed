"""The op: two slot memories trained while they read, one read behind the other."""

import torch
from torch import Tensor

from ..dispatch import OPS, OpInfo, force_form, forced_form, forms
from ..grid import PackedRows
from ..launch import require_kernels
from ..precision import without_autocast
from ..types import Gates, State
from .chunk import chunk_form
from .decode import decode_form
from .inputs import SlotOperands, SlotOptions, check_inputs
from .plan import unsupported
from .reference import reference_form
from .state import check_state


DEFAULTS = SlotOptions()


def _choose(operands: SlotOperands, state: State | None, decodes: bool) -> str:
    asked = forced_form() or operands.options.form
    form = asked or forms(operands.q.device)[0]
    if form != "triton":
        return form
    require_kernels(operands.q.device.type)
    if decodes:
        from .triton_decode import supports

        return "triton" if supports(operands, state) else "chunk"
    reason = unsupported(operands.options, operands.q.dtype, operands.targets.shape[-1], operands.width)
    if reason is not None and asked:
        raise ValueError(f"The Triton form is {reason}: use form='chunk'.")
    return "chunk" if reason else "triton"


def _run(operands: SlotOperands, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    if state is not None:
        check_state(operands, state)
    decodes = state is not None and operands.q.shape[1] == 1
    form = _choose(operands, state, decodes)
    if form == "triton" and decodes:
        from .triton_decode import decode_step

        return decode_step(operands, state)
    inputs = operands.joined()
    if form == "triton":
        from .triton_form import triton_form

        return triton_form(inputs, state, output_final_state)
    inputs = inputs.upcast()
    if form == "reference":
        return reference_form(inputs, state, output_final_state)
    if decodes:
        return decode_form(inputs, state)
    return chunk_form(inputs, state, output_final_state)


def two_pass_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    targets: Tensor,
    gates: Gates,
    start: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    options: SlotOptions = DEFAULTS,
) -> tuple[Tensor, State | None]:
    r"""Two memories of m slots, of keys and of values, trained while they read (Trellis, arXiv 2512.23852).

    Each token makes one step on ½‖φ(S w_t) - α_t‖² in both memories, w = k in that of keys and w = v in that of
    values, behind a decay; then its query is answered by `y_t = V_tᵀ f(K_t q_t)`.

    Args:
        q: queries `[B, T, H, K]`, any float dtype.
        k: keys `[B, T, H, K]`. A step is stable while step size times squared length is well below 2.
        v: values `[B, T, H, V]`, likewise.
        targets: codes α that both memories learn to answer with, `[B, T, H, m]`.
        gates: step size and decay per token, `[B, T, H, 1]`, or `[B, T, H, 2]` with one for keys and one for values.
        start: learned start `[2 H, m, max(K, V)]`, memories of keys first; zeros when `None`.
        initial_state: state returned by an earlier call; batch N with `cu_seqlens`.
        output_final_state: return the state behind the last token.
        mask: `[B, T]`, true where a token is valid. Padded tokens change nothing and get zero outputs.
        cu_seqlens: `[N + 1]` boundaries of sequences packed in one row.
        options: what else defines the function, and the form to run.

    Returns:
        Outputs `[B, T, H, V]` in the dtype of `v`, and the final state (`None` unless asked for), float32.

    Raises:
        ValueError: for shapes or options that do not fit together.

    Example:
        >>> import torch
        >>> from hf_memory.kernels import Gates, SlotOptions, two_pass_slots
        >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 100, 4, 32), dim=-1)
        >>> targets = torch.randn(2, 100, 4, 16)
        >>> gates = Gates(step=0.1 * torch.rand(2, 100, 4, 1), log_decay=-0.1 * torch.rand(2, 100, 4, 1))
        >>> exact = SlotOptions(chunk_size=1)
        >>> out, state = two_pass_slots(q, k, v, targets, gates, output_final_state=True, options=exact)
        >>> out.shape, state["memory"].shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 8, 16, 32]))
    """
    rows = None
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("`mask` and `cu_seqlens` exclude each other: packed rows hold no padding.")
        rows = PackedRows(cu_seqlens, *q.shape[:2], q.device)
        q, k, v, targets, *unpacked = (None if x is None else rows.unpack(x) for x in (q, k, v, targets, *gates))
        gates, mask = Gates(*unpacked), rows.mask
    with without_autocast(q.device):
        operands = check_inputs(q, k, v, targets, gates, start, mask, options)
        out, final = _run(operands, initial_state, output_final_state)
    out = out[..., : v.shape[-1]]
    if rows is not None:
        out = rows.pack(out)
    return out.to(v.dtype), final if output_final_state else None


def _self_check(form: str, device: torch.device | str) -> float:
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 40, 2, 16, generator=g), dim=-1)
    targets = torch.randn(2, 40, 2, 8, generator=g)
    logits = torch.randn(2, 2, 40, 2, 1, generator=g)
    gates = Gates(0.1 * logits[0].sigmoid(), -0.1 * logits[1].sigmoid())

    def run(dtype: torch.dtype, on: torch.device | str, which: str) -> Tensor:
        operands = [x.to(on, dtype) for x in (q, k, v, targets)]
        moved = Gates(*(None if x is None else x.to(on, dtype) for x in gates))
        with force_form(which), torch.no_grad():
            out, _ = two_pass_slots(*operands, moved, options=SlotOptions(chunk_size=8))
        return out.cpu().double()

    truth = run(torch.float64, "cpu", "reference")
    return float((run(torch.float32, device, form) - truth).norm() / truth.norm())


OPS["two_pass_slots"] = OpInfo("two_pass_slots", forms, _self_check)
