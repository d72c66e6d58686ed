"""A tile of the plain linear memory: one triangular solve serves every gradient grid inside it.

With u_t = v_t - k_t M_{c(t)}, c(t) the last token of the previous gradient chunk, the directions of a tile solve

    (I + L) U = V - K base - β_c K D - f_c K S        L[t,s] = G[c(t), s] (k_t . k_s) for s <= c(t)

README.md beside this file derives it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import coupling, inner
from ..coefficients import Coefficients
from ..coupling import Coupling
from ..scan import Tensors


FIELDS = len(Coupling._fields)


def anchor_rows(c: Coefficients, chunk_size: int, log_decay: Tensor | None, decay_before_grad: bool) -> Tensors:
    """Rows `c(t)` of the coefficients: `beta_c, f_c [..., n, 1]` and `grad_c [..., n, n]` (G[c(t), s]).

    `c` and `log_decay` are `[..., 1, n]`. With `decay_before_grad` (grid 1) the gradient of token t sees a_t M_{t-1}.
    """
    n = c.beta.shape[-1]
    last = torch.arange(n, device=c.beta.device) // chunk_size * chunk_size - 1
    inside, last = last >= 0, last.clamp(min=0)
    scale = torch.ones_like(c.beta)
    if decay_before_grad and log_decay is not None:
        scale = log_decay.exp()
    beta = torch.where(inside, c.beta[..., last], 1.0) * scale
    f = None if c.f is None else torch.where(inside, c.f[..., last], 0.0) * scale
    grad = torch.where(inside[:, None], c.grad[..., last, :], 0.0) * scale.unsqueeze(-1)
    return beta.mT, None if f is None else f.mT, grad.squeeze(-3)


@dataclass(frozen=True)
class SolveRule:
    """`kernels.scan.Rule` whose tile holds several chunks.

    tile: `q, k, v [B, H, n, D]`, the `Coupling`, then `anchor_rows`. shared: base. state: offset, momentum (if any).
    """

    def _directions(self, tile: Tensors, base: Tensor | None, d: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """U, and the strictly lower L of its system."""
        _, k, v = tile[:3]
        beta, f, grad = tile[3 + FIELDS :]
        rhs = v - beta * (k @ d)
        if base is not None:
            rhs = rhs - k @ base
        if s is not None:
            rhs = rhs - f * (k @ s)
        system = grad * (k @ k.mT)
        return torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True), system

    def _split(self, tile: Tensors, shared: Tensors, state: Tensors):
        d, s = state if len(state) == 2 else (*state, None)
        return Coupling(*tile[3 : 3 + FIELDS]), shared[0], d, s

    def forward(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        c, base, d, s = self._split(tile, shared, state)
        u, _ = self._directions(tile, base, d, s)
        out = coupling.read("head", c, tile[0], tile[1], u, d, s, base)
        return out, tuple(x for x in coupling.fold("head", c, tile[1], u, d, s) if x is not None)

    def replay(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        c, base, d, s = self._split(tile, shared, state)
        u, system = self._directions(tile, base, d, s)
        return (u, system), tuple(x for x in coupling.fold("head", c, tile[1], u, d, s) if x is not None)

    def backward(self, tile, shared, state, tape, cot, cot_state) -> tuple[Tensors, Tensors, Tensors]:
        c, base, d, s = self._split(tile, shared, state)
        q, k = tile[:2]
        beta, f, grad = tile[3 + FIELDS :]
        u, system = tape
        cot_d, cot_s = cot_state if s is not None else (*cot_state, None)
        folded = coupling.fold_vjp("head", c, k, u, d, s, cot_d, cot_s)
        r = coupling.read_vjp("head", c, q, k, u, d, s, base, cot)
        cot_rhs = torch.linalg.solve_triangular(system.mT, r.u + folded.u, upper=True, unitriangular=True)

        cot_system = -(cot_rhs @ u.mT)
        cot_gram = cot_system * grad
        cot_k = r.x + folded.x + (cot_gram + cot_gram.mT) @ k
        cot_beta, part, cot_memory = coupling.scaled_product_vjp("head", beta, k, d, -cot_rhs)
        cot_k, cot_d = cot_k + part, r.d + folded.d + cot_memory
        cot_f = cot_base = None
        if s is not None:
            cot_f, part, cot_momentum = coupling.scaled_product_vjp("head", f, k, s, -cot_rhs)
            cot_k, cot_s = cot_k + part, r.s + folded.s + cot_momentum
        if base is not None:
            back, part = inner.product_vjp(k, base, -cot_rhs)
            cot_k, cot_base = cot_k + back, inner.over_batch(r.base + part)
        tile_grads = (r.y, cot_k, cot_rhs, r.beta, r.f, r.grad, *folded[:5], cot_beta, cot_f, cot_system * (k @ k.mT))
        return tile_grads, (cot_base,), (cot_d,) if s is None else (cot_d, cot_s)
