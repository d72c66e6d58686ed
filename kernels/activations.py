"""Nonlinearities of deep memories with the two derivatives that a gradient step, and its gradient, need."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Activation(NamedTuple):
    """`value(x)`, `slope(x)` and `curvature(x)`: a function and its first two derivatives."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]


def _normal_pdf(x: Tensor) -> Tensor:
    return (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _tanh_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    square = x * x
    return (
        torch.tanh(_TANH_SCALE * x * (1 + _TANH_CUBIC * square)),
        _TANH_SCALE * (1 + 3 * _TANH_CUBIC * square),
    )


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    tau, p = _tanh_parts(x)
    return 0.5 * (1 + tau) + 0.5 * x * (1 - tau * tau) * p


def _gelu_tanh_curvature(x: Tensor) -> Tensor:
    tau, p = _tanh_parts(x)
    sech2 = 1 - tau * tau
    return sech2 * p + 0.5 * x * sech2 * (6 * _TANH_CUBIC * _TANH_SCALE * x - 2 * tau * p * p)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_curvature(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


ACTIVATIONS = {
    "gelu": Activation(
        functional.gelu,
        lambda x: _normal_cdf(x) + x * _normal_pdf(x),
        lambda x: _normal_pdf(x) * (2 - x * x),
    ),
    "gelu_pytorch_tanh": Activation(
        lambda x: functional.gelu(x, approximate="tanh"), _gelu_tanh_slope, _gelu_tanh_curvature
    ),
    "silu": Activation(functional.silu, _silu_slope, _silu_curvature),
}
