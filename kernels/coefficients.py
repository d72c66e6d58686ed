"""Gates to coefficients: how much of every gradient, and of the incoming state, each token finds in its memory.

With a = 1 - α, inside one tile (Titans; local index 1..n):

    S_t = η_t S_{t-1} + θ_t g_t        M_t = a_t M_{t-1} + S_t        (g_t = k_tᵀ u_t, u_t the descent direction)
    M_t = β_t M_0 + f_t S_0 + Σ_{s<=t} G[t,s] g_s
    S_t = m_t S_0           + Σ_{s<=t} N[t,s] g_s

    A[t,j] = Π_{i=j+1..t} a_i    N[t,s] = θ_s Π_{i=s+1..t} η_i    G = A N    β_t = Π a    m_t = Π η    f = A m

Products run over segments summed in log space, so no entry is a ratio of two underflowing numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Coefficients(NamedTuple):
    """Coefficients of a tile. `n` tokens; momentum entries are `None` without momentum.

    Attributes:
        beta: `[..., n]`, weight of the tile's starting memory.
        f: `[..., n]`, weight of the starting momentum in the memory.
        m: `[..., n]`, weight of the starting momentum in the momentum.
        grad: `[..., n, n]`, G.
        grad_momentum: `[..., n, n]`, N.
    """

    beta: Tensor
    f: Tensor | None
    m: Tensor | None
    grad: Tensor
    grad_momentum: Tensor | None

    def layers(self, depth: int) -> list["Coefficients"]:
        """Split the axis of gate sets, the one in front of time, into `depth` layers."""
        parts = [[None] * depth if x is None else x.chunk(depth, -2) for x in self[:3]]
        parts += [[None] * depth if x is None else x.chunk(depth, -3) for x in self[3:]]
        return [Coefficients(*layer) for layer in zip(*parts)]


def segment_sum(x: Tensor) -> Tensor:
    """`out[..., t, s] = x[..., s+1] + ... + x[..., t]` for s <= t, -inf above the diagonal.

    Summed segment by segment rather than as a difference of prefix sums: one gate near zero would otherwise cost the
    later entries their digits.
    """
    n = x.shape[-1]
    ones = torch.ones(n, n, dtype=torch.bool, device=x.device)
    steps = x.unsqueeze(-1).expand(*x.shape, n).masked_fill(~ones.tril(-1), 0)
    return steps.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def build(step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None) -> Coefficients:
    """Coefficients of tiles whose last axis is time: `[..., n]` gates (float32 or float64)."""
    zeros = torch.zeros_like(step)
    log_decay = zeros if log_decay is None else log_decay
    decay = segment_sum(log_decay).exp()
    beta = log_decay.cumsum(-1).exp()
    if log_momentum is None:
        return Coefficients(beta, None, None, decay * step.unsqueeze(-2), None)
    grad_momentum = segment_sum(log_momentum).exp() * step.unsqueeze(-2)
    m = log_momentum.cumsum(-1).exp()
    f = (decay @ m.unsqueeze(-1)).squeeze(-1)
    return Coefficients(beta, f, m, decay @ grad_momentum, grad_momentum)


def last_row(step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None, phase: Tensor) -> Coefficients:
    """Row `phase` of `build`'s matrices, for buffers `[B, ..., n]` whose entries after `phase[B]` are zero.

    Returns coefficients with a time axis of length one: `beta, f, m [..., 1]`, `grad, grad_momentum [..., 1, n]`.
    """
    n = step.shape[-1]
    log_decay = torch.zeros_like(step) if log_decay is None else log_decay

    def suffix(x: Tensor) -> Tensor:
        """Sum of the entries behind each one (shifted, not subtracted: entries may be -inf)."""
        return functional.pad(x.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))

    beta = log_decay.sum(-1, keepdim=True).exp()
    decay = suffix(log_decay).exp()
    if log_momentum is None:
        return Coefficients(beta, None, None, (decay * step).unsqueeze(-2), None)
    reached = torch.arange(n, device=step.device) <= phase.view(-1, *[1] * (step.dim() - 1))
    decay = (decay * reached).unsqueeze(-2)
    grad = decay @ segment_sum(log_momentum).exp() * step.unsqueeze(-2)
    f = (decay @ log_momentum.cumsum(-1).exp().unsqueeze(-1)).squeeze(-1)
    grad_momentum = (suffix(log_momentum).exp() * step).unsqueeze(-2)
    return Coefficients(beta, f, log_momentum.sum(-1, keepdim=True).exp(), grad, grad_momentum)


def at_end(c: Coefficients, end: Tensor | None) -> Coefficients:
    """The row that carries the state out of each tile.

    Args:
        c: coefficients of tiles `[C, B, ..., n]`.
        end: `[C, B]` int64, how many leading tokens of the tile enter the outgoing state (0: the state passes
            unchanged); `None` when all do.
    Returns:
        `Coefficients` with `beta, f, m [C, B, ..., 1]` and `grad, grad_momentum [C, B, ..., 1, n]`.
    """

    def row(x: Tensor | None, empty: float, axis: int) -> Tensor | None:
        if x is None:
            return None
        if end is None:
            return x.narrow(axis, x.shape[axis] - 1, 1)
        index = end.view(*end.shape, *[1] * (x.dim() - 2))
        shape = list(x.shape)
        shape[axis] = 1
        picked = x.gather(axis, (index - 1).clamp(min=0).expand(shape))
        return torch.where(index > 0, picked, empty)

    return Coefficients(
        row(c.beta, 1.0, -1), row(c.f, 0.0, -1), row(c.m, 1.0, -1), row(c.grad, 0.0, -2), row(c.grad_momentum, 0.0, -2)
    )
