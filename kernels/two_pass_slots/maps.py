"""Nonlinearities over the slots, with what an inner gradient step and its own gradient need of them.

With s = silu(z), e = φ(z) - α, and along the slots: l2_silu(z) = s / √(Σ s² + eps), ln_silu(z) = LayerNorm(s). Closed
forms because generation runs under `no_grad` and `inference_mode`, where autograd inside a forward fails.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import ACTIVATIONS


WRITE_MAPS = ("identity", "silu", "l2_silu", "ln_silu")
READ_MAPS = (*WRITE_MAPS, "softmax")


@dataclass(frozen=True)
class SlotMap:
    """One of `READ_MAPS` over the last axis. `code` and `code_vjp` are for `WRITE_MAPS` only.

    Args:
        name: which one.
        eps: added to the mean square (`ln_silu`: the variance) under the root.
    """

    name: str
    eps: float

    def __call__(self, z: Tensor) -> Tensor:
        """φ(z)."""
        if self.name == "softmax":
            return z.softmax(-1)
        return self._unit(self._inner(z))[0]

    def vjp(self, z: Tensor, cot: Tensor) -> Tensor:
        """J(z)ᵀ cot."""
        if self.name == "softmax":
            p = z.softmax(-1)
            return p * (cot - (p * cot).sum(-1, keepdim=True))
        return self._slope(z, self._project(cot, *self._unit(self._inner(z))))

    def code(self, z: Tensor, target: Tensor) -> Tensor:
        """u = J(z)ᵀ (φ(z) - α), the gradient of ½‖φ(z) - α‖² (trellis c.3)."""
        p, rnorm = self._unit(self._inner(z))
        return self._slope(z, self._project(p - target, p, rnorm))

    def code_vjp(self, z: Tensor, target: Tensor, cot: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `code` for z, a product with the Hessian of the loss, and for the target (trellis e.1)."""
        p, rnorm = self._unit(self._inner(z))
        error = p - target
        tangent = self._slope(z, cot)
        moved = self._project(tangent, p, rnorm)
        if not self._normalises:
            return self._curve(z, cot, error) + self._slope(z, moved), -moved
        along = self._mean(p * error)
        projected = self._project(error, p, rnorm)
        change = self._centre(moved) - moved * along - p * self._mean(moved * error + p * moved)
        change = rnorm * (change - projected * self._mean(p * tangent))
        return self._curve(z, cot, projected) + self._slope(z, change), -moved

    @property
    def _normalises(self) -> bool:
        return self.name in ("l2_silu", "ln_silu")

    def _inner(self, z: Tensor) -> Tensor:
        return z if self.name == "identity" else ACTIVATIONS["silu"].value(z)

    def _slope(self, z: Tensor, x: Tensor) -> Tensor:
        return x if self.name == "identity" else ACTIVATIONS["silu"].slope(z) * x

    def _curve(self, z: Tensor, *factors: Tensor) -> Tensor:
        if self.name == "identity":
            return torch.zeros_like(z)
        product = ACTIVATIONS["silu"].curvature(z)
        for factor in factors:
            product = product * factor
        return product

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True) if self.name == "ln_silu" else x.sum(-1, keepdim=True)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.name == "ln_silu" else x

    def _unit(self, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is left of s when its scale is divided out, and one over that scale."""
        if not self._normalises:
            return s, None
        centred = self._centre(s)
        rnorm = (self._mean(centred * centred) + self.eps).rsqrt()
        return centred * rnorm, rnorm

    def _project(self, x: Tensor, p: Tensor, rnorm: Tensor | None) -> Tensor:
        """The (symmetric) Jacobian of `_unit` times x."""
        if rnorm is None:
            return x
        return rnorm * (self._centre(x) - p * self._mean(p * x))
