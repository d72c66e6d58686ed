"""How one layer of an anchored memory reads its running state and folds a tile into it, with both gradients.

Shapes, one tile: inputs `y` (queries) and `x` (keys) `[..., n, K]`, descent directions `u [..., n, V]`, memory offset
`d`, momentum `s` and base `[..., K, V]`. With the coefficients of `kernels/coefficients.py`:

    read:  r_t = y_t base + β_t y_t d + f_t y_t s + Σ_s G[t,s] (y_t . x_s) u_s
    fold:  d' = β d + f s + Σ_s G_s x_sᵀ u_s        s' = m s + Σ_s N_s x_sᵀ u_s      (coefficients of the last token)

Gates are scalars per head ("head"), or vectors over the rows ("in") or columns ("out") of the matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .coefficients import Coefficients, at_end


class Coupling(NamedTuple):
    """Coefficients shaped to multiply matrices; `c` is 1, K ("in") or V ("out") channels.

    Attributes:
        beta, f: `[..., n, c]`.
        grad: `[..., n, n]`, with channels `[..., c, n, n]`.
        keep, pull, carry: β, f, m of the last token, `[..., 1, 1]`, `[..., K, 1]` or `[..., 1, V]`.
        write, write_momentum: G, N of the last token, `[..., n, c]`.

    Those of momentum are `None` without it.
    """

    beta: Tensor
    f: Tensor | None
    grad: Tensor
    keep: Tensor
    pull: Tensor | None
    carry: Tensor | None
    write: Tensor
    write_momentum: Tensor | None

    @classmethod
    def from_coefficients(cls, c: Coefficients, end: Tensor | None, kind: str) -> "Coupling":
        """Shape `[..., c, n]` coefficients; `end` as in `at_end`."""
        e = at_end(c, end)

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.transpose(-1, -2)

        def side(x: Tensor | None) -> Tensor | None:
            return x if x is None or kind != "out" else x.transpose(-1, -2)

        def last(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.squeeze(-2).transpose(-1, -2)

        grad = c.grad.squeeze(-3) if kind == "head" else c.grad
        return cls(
            rows(c.beta), rows(c.f), grad, side(e.beta), side(e.f), side(e.m), last(e.grad), last(e.grad_momentum)
        )


def mix(kind: str, y: Tensor, x: Tensor, u: Tensor, grad: Tensor) -> Tensor:
    """Σ_s G[t,s] (y_t . x_s) u_s."""
    if kind == "in":
        return torch.einsum("...ti,...si,...its->...ts", y, x, grad) @ u
    scores = y @ x.mT
    if kind == "head":
        return (scores * grad) @ u
    return torch.einsum("...ts,...jts,...sj->...tj", scores, grad, u)


def mix_vjp(
    kind: str, y: Tensor, x: Tensor, u: Tensor, grad: Tensor, cot: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mix` for `y, x, u, grad`."""
    if kind == "in":
        weights = torch.einsum("...ti,...si,...its->...ts", y, x, grad)
        cot_weights = cot @ u.mT
        spread = cot_weights.unsqueeze(-3) * grad
        cot_y = torch.einsum("...its,...si->...ti", spread, x)
        cot_x = torch.einsum("...its,...ti->...si", spread, y)
        cot_grad = torch.einsum("...ts,...ti,...si->...its", cot_weights, y, x)
        return cot_y, cot_x, weights.mT @ cot, cot_grad
    scores = y @ x.mT
    if kind == "head":
        cot_weights = cot @ u.mT
        cot_scores = cot_weights * grad
        cot_u = (scores * grad).mT @ cot
        cot_grad = cot_weights * scores
    else:
        cot_weights = cot.mT.unsqueeze(-1) * u.mT.unsqueeze(-2)
        cot_scores = (cot_weights * grad).sum(-3)
        cot_u = torch.einsum("...ts,...jts,...tj->...sj", scores, grad, cot)
        cot_grad = cot_weights * scores.unsqueeze(-3)
    return cot_scores @ x, cot_scores.mT @ y, cot_u, cot_grad


def read(
    kind: str, c: Coupling, y: Tensor, x: Tensor, u: Tensor, d: Tensor, s: Tensor | None, base: Tensor | None
) -> Tensor:
    """Output of one memory layer for every token of the tile, `[..., n, V]`."""
    out = mix(kind, y, x, u, c.grad)
    for scale, matrix in ((c.beta, d), (c.f, s), (None, base)):
        if matrix is not None:
            out = out + _scaled_product(kind, scale, y, matrix)
    return out


def _scaled_product(kind: str, scale: Tensor | None, y: Tensor, matrix: Tensor) -> Tensor:
    if scale is None:
        return y @ matrix
    return (scale * y) @ matrix if kind == "in" else scale * (y @ matrix)


def scaled_product_vjp(
    kind: str, scale: Tensor, y: Tensor, matrix: Tensor, cot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scale, y and matrix."""
    if kind == "in":
        back = cot @ matrix.mT
        return y * back, scale * back, (scale * y).mT @ cot
    scaled = scale * cot
    return (cot * (y @ matrix)).sum_to_size(scale.shape), scaled @ matrix.mT, y.mT @ scaled


class ReadGradients(NamedTuple):
    """Gradients of `read`; entries of absent operands are `None`."""

    beta: Tensor
    f: Tensor | None
    grad: Tensor
    y: Tensor
    x: Tensor
    u: Tensor
    d: Tensor
    s: Tensor | None
    base: Tensor | None


def read_vjp(
    kind: str,
    c: Coupling,
    y: Tensor,
    x: Tensor,
    u: Tensor,
    d: Tensor,
    s: Tensor | None,
    base: Tensor | None,
    cot: Tensor,
) -> ReadGradients:
    cot_y, cot_x, cot_u, cot_grad = mix_vjp(kind, y, x, u, c.grad, cot)
    cot_beta, part, cot_d = scaled_product_vjp(kind, c.beta, y, d, cot)
    cot_y = cot_y + part
    cot_f = cot_s = cot_base = None
    if s is not None:
        cot_f, part, cot_s = scaled_product_vjp(kind, c.f, y, s, cot)
        cot_y = cot_y + part
    if base is not None:
        cot_base = y.mT @ cot
        cot_y = cot_y + cot @ base.mT
    return ReadGradients(cot_beta, cot_f, cot_grad, cot_y, cot_x, cot_u, cot_d, cot_s, cot_base)


def _outer(kind: str, weight: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Σ_s w_s x_sᵀ u_s."""
    return x.mT @ (weight * u) if kind == "out" else (weight * x).mT @ u


def _outer_vjp(kind: str, weight: Tensor, x: Tensor, u: Tensor, cot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, x and u."""
    if kind == "out":
        back = x @ cot
        return u * back, (weight * u) @ cot.mT, weight * back
    back = u @ cot.mT
    return (x * back).sum_to_size(weight.shape), weight * back, (weight * x) @ cot


def fold(kind: str, c: Coupling, x: Tensor, u: Tensor, d: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Memory offset and momentum behind the tile."""
    after = c.keep * d + _outer(kind, c.write, x, u)
    if s is None:
        return after, None
    return after + c.pull * s, c.carry * s + _outer(kind, c.write_momentum, x, u)


class FoldGradients(NamedTuple):
    """Gradients of `fold`; momentum entries are `None` without momentum."""

    keep: Tensor
    pull: Tensor | None
    carry: Tensor | None
    write: Tensor
    write_momentum: Tensor | None
    x: Tensor
    u: Tensor
    d: Tensor
    s: Tensor | None


def fold_vjp(
    kind: str, c: Coupling, x: Tensor, u: Tensor, d: Tensor, s: Tensor | None, cot_d: Tensor, cot_s: Tensor | None
) -> FoldGradients:
    cot_write, cot_x, cot_u = _outer_vjp(kind, c.write, x, u, cot_d)
    cot_keep = (cot_d * d).sum_to_size(c.keep.shape)
    if s is None:
        return FoldGradients(cot_keep, None, None, cot_write, None, cot_x, cot_u, c.keep * cot_d, None)
    cot_write_momentum, part_x, part_u = _outer_vjp(kind, c.write_momentum, x, u, cot_s)
    return FoldGradients(
        cot_keep,
        (cot_d * s).sum_to_size(c.pull.shape),
        (cot_s * s).sum_to_size(c.carry.shape),
        cot_write,
        cot_write_momentum,
        cot_x + part_x,
        cot_u + part_u,
        c.keep * cot_d,
        c.pull * cot_d + c.carry * cot_s,
    )
