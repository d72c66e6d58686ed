"""Corners of the anchored memories under the names they have elsewhere; every comparison needs them.

All take `q, k [B, T, H, K]`, `v [B, T, H, V]` and gates `[B, T, H]`, keys normalised by the caller, and return what
`anchored_linear` returns. Outputs are `S_t q_t` without a scale.
"""

from dataclasses import replace

from torch import Tensor

from .dispatch import anchored_linear
from .types import AnchoredOptions, Gates, Norm, State


ONLINE = AnchoredOptions(chunk_size=1)


def _column(gate: Tensor | None) -> Tensor | None:
    return None if gate is None else gate.unsqueeze(-1)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: State | None = None, output_final_state: bool = False
) -> tuple[Tensor, State | None]:
    """DeltaNet: `S_t = S_{t-1} + β_t k_tᵀ (v_t - k_t S_{t-1})` (titans j6).

    Args:
        q, k, v: see the module docstring.
        beta: write strength in [0, 1], `[B, T, H]`.
        initial_state: state returned by an earlier call.
        output_final_state: return the state behind the last token.
    """
    return anchored_linear(
        q,
        k,
        v,
        Gates(_column(beta)),
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=ONLINE,
    )


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """Gated DeltaNet: `S_t = a_t S_{t-1} + β_t k_tᵀ (v_t - a_t k_t S_{t-1})`, `a = exp(g)` (titans j7).

    Args:
        q, k, v: see the module docstring.
        g: log decay <= 0, `[B, T, H]`.
        beta: write strength in [0, 1], `[B, T, H]`.
        initial_state: state returned by an earlier call.
        output_final_state: return the state behind the last token.
    """
    return anchored_linear(
        q,
        k,
        v,
        Gates(_column(beta), _column(g)),
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=replace(ONLINE, decay_before_grad=True),
    )


def momentum_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_momentum: Tensor,
    g: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """Exact online linear Titans: the delta rule whose steps pass through a momentum buffer, with optional decay.

    Args:
        q, k, v: see the module docstring.
        beta: inner step size, `[B, T, H]`.
        log_momentum: log of the momentum decay, <= 0, `[B, T, H]`.
        g: log decay <= 0, `[B, T, H]`; `None` means nothing is forgotten.
        initial_state: state returned by an earlier call.
        output_final_state: return the state behind the last token.
    """
    return anchored_linear(
        q,
        k,
        v,
        Gates(_column(beta), _column(g), _column(log_momentum)),
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=ONLINE,
    )


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    weight: Tensor,
    norm: Norm | tuple[Tensor, Tensor],
    chunk_size: int = 16,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """TTT-Linear without fast bias and without the 1/i token weights of its code (titans j10; ttt i1, i3).

    Args:
        q, k, v: see the module docstring (K == V).
        step: inner learning rate of each token, `[B, T, H]`.
        weight: learned start `[H, K, K]`.
        norm: LayerNorm affine, `[H, K]` each.
        chunk_size: inner mini-batch.
        initial_state: state returned by an earlier call.
        output_final_state: return the state behind the last token.
    """
    return anchored_linear(
        q,
        k,
        v,
        Gates(_column(step)),
        weight,
        norm,
        initial_state=initial_state,
        output_final_state=output_final_state,
        options=AnchoredOptions(chunk_size=chunk_size),
    )
