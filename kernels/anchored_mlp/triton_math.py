"""The inner loss and the activations inside kernels: `kernels/inner.py` and `kernels/activations.py`, on tiles.

Tiles are padded to powers of two; `inside` marks the columns that exist. What these functions return is zero in the
others, as long as the affine of the norm is.
"""

import triton
import triton.language as tl


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Value, slope and curvature; what a caller drops is not computed."""
    if ACT == "gelu":
        pdf = tl.exp(-0.5 * x * x) * 0.3989422804014327
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * pdf, pdf * (2.0 - x * x)
    if ACT == "gelu_pytorch_tanh":
        square = x * x
        tau = 2.0 * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square)) - 1.0
        p = 0.7978845608028654 * (1.0 + 0.134145 * square)
        sech2 = 1.0 - tau * tau
        cdf = 0.5 + 0.5 * tau
        curvature = sech2 * p + 0.5 * x * sech2 * (0.2140644488178072 * x - 2.0 * tau * p * p)
        return x * cdf, cdf + 0.5 * x * sech2 * p, curvature
    s = tl.sigmoid(x)
    rest = s * (1.0 - s)
    return x * s, s + x * rest, rest * (2.0 + x * (1.0 - 2.0 * s))


@triton.jit
def row_mean(x, WIDTH: tl.constexpr):
    return tl.sum(x, axis=1)[:, None] / WIDTH


@triton.jit
def standardise(z, inside, eps, WIDTH: tl.constexpr):
    """`(z - mean) / std` of every row, and `1 / std`."""
    centred = tl.where(inside, z - row_mean(z, WIDTH), 0.0)
    rstd = tl.rsqrt(row_mean(centred * centred, WIDTH) + eps)
    return centred * rstd, rstd


@triton.jit
def project(x, unit, inside, WIDTH: tl.constexpr):
    """Remove the mean of `x` and its component along `unit`."""
    return tl.where(inside, x - row_mean(x, WIDTH) - unit * row_mean(x * unit, WIDTH), 0.0)


@triton.jit
def descent(z, k, v, weight, bias, inside, eps, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr):
    """-∂ℓ/∂z of ½‖M(k) - v‖²."""
    if not HAS_NORM:
        return v - z
    unit, rstd = standardise(z, inside, eps, WIDTH)
    error = weight[None, :] * unit + bias[None, :] - (v - k)
    return -rstd * project(weight[None, :] * error, unit, inside, WIDTH)


@triton.jit
def descent_vjp(z, k, v, cot, weight, bias, inside, eps, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr):
    """Gradients of `descent` for z, for v (its negative is that of k, with a norm), for weight and for bias."""
    if not HAS_NORM:
        return -cot, cot, tl.sum(cot, axis=0), tl.sum(cot, axis=0)
    gamma = weight[None, :]
    unit, rstd = standardise(z, inside, eps, WIDTH)
    error = gamma * unit + bias[None, :] - (v - k)
    scaled = gamma * error
    cot = -cot
    projected = project(cot, unit, inside, WIDTH)
    cot_unit = gamma * gamma * projected - cot * row_mean(scaled * unit, WIDTH) - scaled * row_mean(cot * unit, WIDTH)
    along = row_mean(cot * project(scaled, unit, inside, WIDTH), WIDTH)
    cot_z = rstd * (rstd * project(cot_unit, unit, inside, WIDTH)) - along * rstd * rstd * unit
    cot_error = gamma * rstd * projected
    cot_weight = tl.sum(rstd * projected * (error + gamma * unit), axis=0)
    return cot_z, -cot_error, cot_weight, tl.sum(cot_error, axis=0)


@triton.jit
def output(q, r, weight, bias, inside, eps, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr):
    """What the memory returns for `q` with last pre-activation `r`."""
    if not HAS_NORM:
        return r
    unit, _ = standardise(r, inside, eps, WIDTH)
    return q + unit * weight[None, :] + bias[None, :]


@triton.jit
def output_vjp(r, cot, weight, inside, eps, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr):
    """Gradients of `output` for r, weight and bias; that of q is `cot` itself, with a norm."""
    if not HAS_NORM:
        return cot, tl.sum(cot, axis=0), tl.sum(cot, axis=0)
    unit, rstd = standardise(r, inside, eps, WIDTH)
    cot_r = rstd * project(cot * weight[None, :], unit, inside, WIDTH)
    return cot_r, tl.sum(cot * unit, axis=0), tl.sum(cot, axis=0)
