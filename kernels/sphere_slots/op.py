"""The op: checks, packed sequences, and the form to run."""

import torch
from torch import Tensor

from ..dispatch import OPS, OpInfo, force_form, forced_form
from ..grid import PackedRows
from ..launch import kernels_run_on, require_kernels
from ..precision import without_autocast
from ..types import Gates, State
from .chunk import chunk_form
from .decode import decode_form
from .reference import reference_form
from .types import SphereInputs, SphereOptions, check_inputs, check_state


DEFAULTS = SphereOptions()


def forms(device: torch.device | str) -> list[str]:
    """Forms that can run on a device, the one taken by default first."""
    kind = torch.device(device).type
    # The interpreter runs kernels on the CPU to test them, never because nobody asked.
    fast = ["triton", "chunk"] if kind == "cuda" else ["chunk", "triton"]
    return [*fast, "reference"] if kernels_run_on(kind) else ["chunk", "reference"]


def _choose(inputs: SphereInputs) -> str:
    asked = forced_form() or inputs.options.form
    form = asked or forms(inputs.q.device)[0]
    if form != "triton":
        return form
    require_kernels(inputs.q.device.type)
    from .triton_op import unsupported

    reason = unsupported(inputs)
    if reason is not None and asked:
        raise ValueError(f"The Triton form is {reason}: use form='chunk'.")
    return "chunk" if reason else "triton"


def _run(inputs: SphereInputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    if state is not None:
        check_state(inputs, state)
    form = _choose(inputs)
    if form == "triton":  # one token or many
        from .triton_op import triton_form

        return triton_form(inputs, state, output_final_state)
    inputs = inputs.upcast()
    if form == "reference":
        return reference_form(inputs, state, output_final_state)
    if state is not None and inputs.q.shape[1] == 1:
        return decode_form(inputs, state)
    return chunk_form(inputs, state, output_final_state)


def sphere_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    slots: Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    options: SphereOptions = DEFAULTS,
) -> tuple[Tensor, State | None]:
    r"""M slots per head, unit vectors of width D, each moved by every token along its own sphere (Lattice).

    Each token makes one gradient step on the inner loss of `options.objective`, evaluated through the normalised
    slots, so that the step of each slot is orthogonal to it; then it is answered by `q φ` (`dec`, `sim`: a
    combination of slots) or `φ q` (`enc`: how far each slot points along the query), φ the slots as rows `[M, D]`.

    Args:
        q: queries `[B, T, H, M]` (`enc`: `[B, T, H, D]`), any float dtype.
        k: keys, in the shape of `q`. `step * ‖k‖²` should not exceed 1.
        v: values `[B, T, H, D]` (`enc`: `[B, T, H, M]`).
        gates: step size `[B, T, H, 1]`, or one per slot `[B, T, H, M]`, and but for `retract` a decay `[B, T, H, 1]`.
        slots: learned start `[H, M, D]`, brought to unit length unless `normalization="none"`.
        initial_state: state returned by an earlier call; batch N with `cu_seqlens`.
        output_final_state: return the state behind the last token.
        mask: `[B, T]`, true where a token is valid. Padded tokens change nothing and get zero outputs.
        cu_seqlens: `[N + 1]` boundaries of sequences packed in one row.
        options: what else defines the function, and the form to run.

    Returns:
        Outputs in the shape and dtype of `v`, and the final state (`None` unless asked for), float32.

    Raises:
        ValueError: for shapes or options that do not fit together.

    Example:
        >>> import torch
        >>> from hf_memory.kernels import Gates, SphereOptions, sphere_slots
        >>> q, k = torch.nn.functional.normalize(torch.randn(2, 2, 100, 4, 16), dim=-1)
        >>> v, start = torch.randn(2, 100, 4, 64), torch.randn(4, 16, 64)
        >>> gates = Gates(step=torch.rand(2, 100, 4, 1))
        >>> online = SphereOptions(chunk_size=1)
        >>> out, state = sphere_slots(q, k, v, gates, start, output_final_state=True, options=online)
        >>> out.shape, state["slots"].shape
        (torch.Size([2, 100, 4, 64]), torch.Size([2, 4, 16, 64]))
        >>> torch.allclose(state["slots"].norm(dim=-1), torch.ones(2, 4, 16), atol=1e-6)
        True
    """
    rows = None
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("`mask` and `cu_seqlens` exclude each other: packed rows hold no padding.")
        rows = PackedRows(cu_seqlens, *q.shape[:2], q.device)
        q, k, v, *unpacked = (None if x is None else rows.unpack(x) for x in (q, k, v, *gates))
        gates, mask = Gates(*unpacked), rows.mask
    with without_autocast(q.device):
        out, final = _run(check_inputs(q, k, v, gates, slots, mask, options), initial_state, output_final_state)
    if rows is not None:
        out = rows.pack(out)
    return out.to(v.dtype), final if output_final_state else None


def _self_check(form: str, device: torch.device | str) -> float:
    g = torch.Generator().manual_seed(0)
    q, k = torch.nn.functional.normalize(torch.randn(2, 2, 40, 2, 8, generator=g), dim=-1)
    v, step = torch.randn(2, 40, 2, 16, generator=g), 0.3 * torch.rand(2, 40, 2, 1, generator=g)
    operands = (q, k, v, step, torch.randn(2, 8, 16, generator=g))

    def run(dtype: torch.dtype, on: torch.device | str, which: str) -> Tensor:
        *tokens, step, slots = (x.to(on, dtype) for x in operands)
        with force_form(which), torch.no_grad():
            out, _ = sphere_slots(*tokens, Gates(step), slots, options=SphereOptions(chunk_size=8))
        return out.cpu().double()

    truth = run(torch.float64, "cpu", "reference")
    return float((run(torch.float32, device, form) - truth).norm() / truth.norm())


OPS["sphere_slots"] = OpInfo("sphere_slots", forms, _self_check)
