"""`maps.py` on blocks with MB slots along AXIS, of which the first M are there; the others stay zero."""

import triton
import triton.language as tl


@triton.jit
def _sum(x, AXIS: tl.constexpr):
    return tl.expand_dims(tl.sum(x, axis=AXIS), AXIS)


@triton.jit
def _inside(M: tl.constexpr, MB: tl.constexpr, AXIS: tl.constexpr):
    return tl.expand_dims(tl.arange(0, MB) < M, 1 - AXIS)


@triton.jit
def _mean(x, M: tl.constexpr, MAP: tl.constexpr, AXIS: tl.constexpr):
    total = _sum(x, AXIS)
    if MAP == "ln_silu":
        return total / M
    return total


@triton.jit
def _centre(x, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, AXIS: tl.constexpr):
    if MAP == "ln_silu":
        return tl.where(_inside(M, MB, AXIS), x - _sum(x, AXIS) / M, 0.0)
    return x


@triton.jit
def _project(x, p, rnorm, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, AXIS: tl.constexpr):
    if MAP == "l2_silu" or MAP == "ln_silu":
        return rnorm * (_centre(x, M, MB, MAP, AXIS) - p * _mean(p * x, M, MAP, AXIS))
    return x


@triton.jit
def _unit(z, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr):
    """φ(z) and one over its norm."""
    s = z
    if MAP != "identity":
        s = z * tl.sigmoid(z)
    rnorm = 1.0
    if MAP == "l2_silu" or MAP == "ln_silu":
        s = _centre(s, M, MB, MAP, AXIS)
        rnorm = tl.rsqrt(_mean(s * s, M, MAP, AXIS) + EPS)
        s *= rnorm
    return s, rnorm


@triton.jit
def _slope(z, MAP: tl.constexpr):
    slope = tl.zeros_like(z) + 1.0
    if MAP != "identity":
        s = tl.sigmoid(z)
        slope = s * (1 + z * (1 - s))
    return slope


@triton.jit
def _curvature(z, MAP: tl.constexpr):
    curvature = tl.zeros_like(z)
    if MAP != "identity":
        s = tl.sigmoid(z)
        curvature = s * (1 - s) * (2 + z * (1 - 2 * s))
    return curvature


@triton.jit
def _softmax(z, M: tl.constexpr, MB: tl.constexpr, AXIS: tl.constexpr):
    z = tl.where(_inside(M, MB, AXIS), z, float("-inf"))
    e = tl.exp(z - tl.expand_dims(tl.max(z, axis=AXIS), AXIS))
    return e / _sum(e, AXIS)


@triton.jit
def map_value(z, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr):
    """φ(z)."""
    if MAP == "softmax":
        return _softmax(z, M, MB, AXIS)
    p, rnorm = _unit(z, M, MB, MAP, EPS, AXIS)
    return p


@triton.jit
def map_vjp(z, cot, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr):
    """J(z)ᵀ cot."""
    if MAP == "softmax":
        p = _softmax(z, M, MB, AXIS)
        return p * (cot - _sum(p * cot, AXIS))
    p, rnorm = _unit(z, M, MB, MAP, EPS, AXIS)
    return _slope(z, MAP) * _project(cot, p, rnorm, M, MB, MAP, AXIS)


@triton.jit
def code(z, target, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr):
    """u = J(z)ᵀ (φ(z) - α)."""
    p, rnorm = _unit(z, M, MB, MAP, EPS, AXIS)
    return _slope(z, MAP) * _project(p - target, p, rnorm, M, MB, MAP, AXIS)


@triton.jit
def code_vjp(
    z, target, cot, M: tl.constexpr, MB: tl.constexpr, MAP: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr
):
    """Gradients of `code` for z and for the target."""
    p, rnorm = _unit(z, M, MB, MAP, EPS, AXIS)
    error = p - target
    slope, curvature = _slope(z, MAP), _curvature(z, MAP)
    tangent = slope * cot
    moved = _project(tangent, p, rnorm, M, MB, MAP, AXIS)
    projected = _project(error, p, rnorm, M, MB, MAP, AXIS)
    change = moved
    if MAP == "l2_silu" or MAP == "ln_silu":
        change = _centre(moved, M, MB, MAP, AXIS) - moved * _mean(p * error, M, MAP, AXIS)
        change -= p * _mean(moved * error + p * moved, M, MAP, AXIS)
        change = rnorm * (change - projected * _mean(p * tangent, M, MAP, AXIS))
    return curvature * cot * projected + slope * change, -moved
