"""The one place that chooses which form of an op runs: by the device of its tensors, unless a caller forces one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .anchored_mlp.decode import decode_form
from .anchored_mlp.reference import reference_form
from .grid import PackedRows
from .launch import kernels_run_on, require_kernels
from .precision import without_autocast
from .prefill import chunk_form
from .state import check_state
from .types import FORMS, AnchoredOptions, Gates, Inputs, Norm, State, check_inputs


LINEAR_DEFAULTS = AnchoredOptions()
# Decay towards zero makes a deep memory chaotic (anchored_mlp/README.md).
DEEP_DEFAULTS = AnchoredOptions(decay_target="init")

# A plain global: torch.compile can guard on it, but not on a context variable.
_forced: str | None = None


@contextmanager
def force_form(form: str | None) -> Iterator[None]:
    """Run every op inside the `with` block in one form, whatever its options say.

    Args:
        form: `"reference"`, `"chunk"` or `"triton"`; `None` changes nothing.

    Raises:
        ValueError: for an unknown form.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"Unknown form {form!r}, the forms are {FORMS}.")
    global _forced
    before, _forced = _forced, form
    try:
        yield
    finally:
        _forced = before


def forced_form() -> str | None:
    """What an enclosing `force_form` asks for."""
    return _forced


def forms(device: torch.device | str) -> list[str]:
    """Forms that can run on a device, the one taken by default first."""
    kind = torch.device(device).type
    # The interpreter runs kernels on the CPU to test them, never because nobody asked.
    fast = ["triton", "chunk"] if kind == "cuda" else ["chunk", "triton"]
    return [*fast, "reference"] if kernels_run_on(kind) else ["chunk", "reference"]


def overwrites_state(device: torch.device | str) -> bool:
    """Whether a call of one token makes use of `AnchoredOptions.overwrite_state` on a device."""
    return (_forced or forms(device)[0]) == "triton"


def _choose(inputs: Inputs, state: State | None, decodes: bool) -> str:
    asked = _forced or inputs.options.form
    form = asked or forms(inputs.q.device)[0]
    if form != "triton":
        return form
    require_kernels(inputs.q.device.type)
    if decodes:
        from .anchored_mlp.triton_decode import supports

        return "triton" if supports(inputs, state) else "chunk"
    from .triton_form import unsupported

    reason = unsupported(inputs)
    if reason is not None and asked:
        raise ValueError(f"The Triton form is {reason}: use form='chunk'.")
    return "chunk" if reason else "triton"


def _run(inputs: Inputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    if state is not None:
        check_state(inputs, state)
    decodes = state is not None and inputs.q.shape[1] == 1
    form = _choose(inputs, state, decodes)
    if form == "triton" and decodes:
        from .anchored_mlp.triton_decode import decode_step

        return decode_step(inputs, state)
    if form == "triton":
        from .triton_form import triton_form

        return triton_form(inputs, state, output_final_state)
    inputs = inputs.upcast()
    if form == "reference":
        return reference_form(inputs, state, output_final_state)
    if decodes:
        return decode_form(inputs, state)
    return chunk_form(inputs, state, output_final_state)


def _anchored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    norm: Norm | tuple[Tensor, Tensor] | None,
    initial_state: State | None,
    output_final_state: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: AnchoredOptions,
) -> tuple[Tensor, State | None]:
    rows = None
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("`mask` and `cu_seqlens` exclude each other: packed rows hold no padding.")
        rows = PackedRows(cu_seqlens, *q.shape[:2], q.device)
        q, k, v, *unpacked = (None if x is None else rows.unpack(x) for x in (q, k, v, *gates))
        gates, mask = Gates(*unpacked), rows.mask
    with without_autocast(q.device):
        inputs = check_inputs(q, k, v, gates, weights, norm, mask, options)
        out, final = _run(inputs, initial_state, output_final_state)
    if rows is not None:
        out = rows.pack(out)
    return out.to(v.dtype), final if output_final_state else None


def anchored_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weight: Tensor | None = None,
    norm: Norm | tuple[Tensor, Tensor] | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    options: AnchoredOptions = LINEAR_DEFAULTS,
) -> tuple[Tensor, State | None]:
    r"""Matrix memory trained while it reads (Titans eqs. 13-15 with a linear memory).

    Each token makes one step on ½‖M(k_t) - v_t‖² with decay and momentum, then is answered by `M(q_t)`, where
    `M(x) = x W`, or `x + LayerNorm(x W)` with `norm`.

    Args:
        q: queries `[B, T, H, K]`, any float dtype.
        k: keys `[B, T, H, K]`.
        v: values `[B, T, H, V]`.
        gates: per-token step size, decay and momentum, `[B, T, H, 1]` or `[B, T, H, V]`.
        weight: learned start `[H, K, V]`; zeros when `None`.
        norm: affine `(weight, bias)` of the memory's LayerNorm, `[H, V]` each; needs K == V.
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
        >>> from hf_memory.kernels import AnchoredOptions, Gates, anchored_linear
        >>> q, k, v = torch.randn(3, 2, 100, 4, 32)
        >>> k = torch.nn.functional.normalize(k, dim=-1)
        >>> gates = Gates(step=torch.rand(2, 100, 4, 1), log_decay=-torch.rand(2, 100, 4, 1))
        >>> online = AnchoredOptions(chunk_size=1)
        >>> out, state = anchored_linear(q, k, v, gates, output_final_state=True, options=online)
        >>> out.shape, state["memory_0"].shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 4, 32, 32]))
        >>> first = Gates(step=gates.step[:1], log_decay=gates.log_decay[:1])
        >>> bounds = torch.tensor([0, 63, 100])  # two sequences packed in one row
        >>> packed, _ = anchored_linear(q[:1], k[:1], v[:1], first, cu_seqlens=bounds, options=online)
        >>> torch.allclose(packed[:, :63], out[:1, :63], atol=1e-5)
        True
    """
    if weight is None:
        weight = q.new_zeros(q.shape[2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    return _anchored(q, k, v, gates, (weight,), norm, initial_state, output_final_state, mask, cu_seqlens, options)


def anchored_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    norm: Norm | tuple[Tensor, Tensor] | None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    options: AnchoredOptions = DEEP_DEFAULTS,
) -> tuple[Tensor, State | None]:
    """Deep memory trained while it reads: `M(x) = x + LayerNorm(act(... act(x W_1) ...) W_L)` (Titans, depth L >= 2).

    Args:
        q: queries `[B, T, H, K]`, any float dtype.
        k: keys `[B, T, H, K]`.
        v: values `[B, T, H, K]`.
        gates: per-token step size, decay and momentum, `[B, T, H, L]`, or `[B, T, H, 2 K]` for depth 2.
        weights: learned starts `[H, K, n], [H, n, n], ..., [H, n, K]`.
        norm: affine `(weight, bias)` of the memory's LayerNorm, `[H, K]` each; `None` drops LayerNorm and residual.
        initial_state: see `anchored_linear`, as are the remaining arguments.
        output_final_state: return the state behind the last token.
        mask: `[B, T]` valid tokens.
        cu_seqlens: `[N + 1]` boundaries of packed sequences.
        options: what else defines the function, and the form to run.

    Returns:
        Outputs `[B, T, H, K]` in the dtype of `v`, and the final state (`None` unless asked for), float32.

    Raises:
        ValueError: for shapes or options that do not fit together.
    """
    return _anchored(
        q, k, v, gates, tuple(weights), norm, initial_state, output_final_state, mask, cu_seqlens, options
    )


@dataclass(frozen=True)
class OpInfo:
    """An op as `hf-memory doctor` sees it.

    Attributes:
        name: public name.
        forms: device -> forms that run there, the default first.
        self_check: `(form, device)` -> relative error of a small float32 call against the float64 reference.
    """

    name: str
    forms: Callable[[torch.device | str], list[str]]
    self_check: Callable[[str, torch.device | str], float]


def _self_check(depth: int) -> Callable[[str, torch.device | str], float]:
    def check(form: str, device: torch.device | str) -> float:
        g = torch.Generator().manual_seed(0)
        batch, time, heads, width = 2, 40, 2, 16
        q, k, v = torch.randn(3, batch, time, heads, width, generator=g)
        k = torch.nn.functional.normalize(k, dim=-1)
        logits = torch.randn(3, batch, time, heads, depth, generator=g)
        gates = Gates(0.1 * logits[0].sigmoid(), -0.1 * logits[1].sigmoid(), -logits[2].sigmoid())
        widths = [width, *[2 * width] * (depth - 1), width]
        weights = [torch.randn(heads, a, b, generator=g) * a**-0.5 for a, b in zip(widths, widths[1:], strict=False)]
        norm = None if depth == 1 else Norm(torch.ones(heads, width), torch.zeros(heads, width))
        options = AnchoredOptions(chunk_size=8, decay_target="init")

        def run(dtype: torch.dtype, on: torch.device | str, which: str) -> Tensor:
            operands = [x.to(on, dtype) for x in (q, k, v)]
            with force_form(which), torch.no_grad():
                out, _ = _anchored(
                    *operands,
                    Gates(*(x.to(on, dtype) for x in gates)),
                    [w.to(on, dtype) for w in weights],
                    None if norm is None else Norm(*(x.to(on, dtype) for x in norm)),
                    None, False, None, None, options,
                )  # fmt: skip
            return out.cpu().double()

        truth = run(torch.float64, "cpu", "reference")
        return float((run(torch.float32, device, form) - truth).norm() / truth.norm())

    return check


OPS: dict[str, OpInfo] = {
    "anchored_linear": OpInfo("anchored_linear", forms, _self_check(1)),
    "anchored_mlp": OpInfo("anchored_mlp", forms, _self_check(2)),
}
