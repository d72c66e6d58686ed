"""The inner loss of an anchored memory, ½‖M(k) - v‖², in closed form.

`M(x) = x + LN(z)` with a norm, `M(x) = z` without; z is the last pre-activation. Closed forms because generation runs
under `no_grad` and `inference_mode`, where autograd inside a forward fails.
"""

import torch
from torch import Tensor

from .types import Norm


def standardise(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(z - mean) / std` over the last axis (biased variance, eps inside the root), and `1 / std`."""
    centred = z - z.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _project(x: Tensor, unit: Tensor) -> Tensor:
    """Remove the mean of `x` and its component along `unit`: the Jacobian of `standardise` up to 1/std."""
    return x - x.mean(-1, keepdim=True) - unit * (x * unit).mean(-1, keepdim=True)


def output(x: Tensor, z: Tensor, norm: Norm | None, eps: float) -> Tensor:
    """What the memory returns, `[B, H, n, V]`; norm entries `[H, 1, V]`."""
    if norm is None:
        return z
    return x + standardise(z, eps)[0] * norm.weight + norm.bias


def output_vjp(z: Tensor, norm: Norm | None, eps: float, cot: Tensor) -> tuple[Tensor, Tensor | None, Norm | None]:
    """Gradients of `output` for z, for x (`None` without a residual) and for the norm's affine."""
    if norm is None:
        return cot, None, None
    unit, rstd = standardise(z, eps)
    affine = Norm((cot * unit).sum((0, 2)).unsqueeze(1), cot.sum((0, 2)).unsqueeze(1))
    return rstd * _project(cot * norm.weight, unit), cot, affine


def descent(z: Tensor, k: Tensor, v: Tensor, norm: Norm | None, eps: float) -> Tensor:
    """-∂ℓ/∂z, the direction in which a step moves the last pre-activation (titans c2)."""
    if norm is None:
        return v - z
    unit, rstd = standardise(z, eps)
    error = norm.weight * unit + norm.bias - (v - k)
    return -rstd * _project(norm.weight * error, unit)


def descent_vjp(
    z: Tensor, k: Tensor, v: Tensor, norm: Norm | None, eps: float, cot: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Norm | None]:
    """Gradients of `descent` for z, k (`None` without a residual), v and the norm's affine (titans e)."""
    if norm is None:
        return -cot, None, cot, None
    unit, rstd = standardise(z, eps)
    weight = norm.weight
    error = weight * unit + norm.bias - (v - k)
    scaled = weight * error
    cot = -cot
    projected = _project(cot, unit)
    cot_unit = rstd * (
        weight * weight * projected
        - cot * (scaled * unit).mean(-1, keepdim=True)
        - scaled * (cot * unit).mean(-1, keepdim=True)
    )
    along = (cot * _project(scaled, unit)).mean(-1, keepdim=True)
    cot_z = rstd * _project(cot_unit, unit) - along * rstd.square() * unit
    cot_error = weight * rstd * projected
    affine = Norm(
        (rstd * projected * (error + weight * unit)).sum((0, 2)).unsqueeze(1), cot_error.sum((0, 2)).unsqueeze(1)
    )
    return cot_z, cot_error, -cot_error, affine


def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sum of gradients of which either may be absent."""
    if total is None or part is None:
        return part if total is None else total
    return total + part


def product_vjp(x: Tensor, weight: Tensor, cot: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x @ weight`."""
    return cot @ weight.mT, x.mT @ cot


def over_batch(x: Tensor) -> Tensor:
    """Gradient of a weight `[H, K, V]` from its per-row gradients `[B, H, K, V]`."""
    return torch.sum(x, 0)
